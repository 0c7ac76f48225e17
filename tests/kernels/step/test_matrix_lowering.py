"""Lowering names products and traces, knows which products are symmetric, and refuses what it cannot lower."""

from collections.abc import Sequence
from typing import Any

import pytest
import sympy as sp

from sylva_compile.kernels.step.lowering import G, P, Repeat, Rule, height, width
from sylva_compile.kernels.step.matrix_lowering import lower_matrices
from sylva_compile.kernels.step.matrix_program import (
    Elementwise,
    Loop,
    MatrixProgram,
    Number,
    Product,
    Sum,
    Transpose,
)

LR, BETA = sp.symbols("lr beta", real=True)
M, X = (sp.MatrixSymbol(name, height, width) for name in "MX")
A, B = (sp.MatrixSymbol(name, width, width) for name in "AB")
HYPER = ((LR, "lr"), (BETA, "beta"))


def lowered(*equations: Any, states: Sequence[tuple[Any, str]] = ()) -> MatrixProgram:
    return lower_matrices(Rule("Test", equations, tuple(states), HYPER))


def products(program: MatrixProgram) -> list[Product]:
    return [each for each in program.statements if isinstance(each, Product)]


class TestProducts:
    def test_a_gram_matrix_is_symmetric_and_needs_no_transpose(self) -> None:
        (product, _) = products(lowered((A, G.T * G), (P, P - G * A)))
        assert product.transposed
        assert product.symmetric
        assert product.left == product.right

    def test_polynomials_of_a_symmetric_matrix_are_symmetric(self) -> None:
        program = lowered((A, G.T * G), (B, BETA * A + 2 * A**2), (A, B * A), (P, P - LR * G * A))
        assert [product.symmetric for product in products(program)] == [True, True, True, False]

    def test_products_of_two_grams_are_not(self) -> None:
        program = lowered((A, G.T * G), (B, P.T * P), (P, P - G * A * B), (B, A * B), (P, P - G * B))
        assert [product.symmetric for product in products(program)] == [True, True, False, False, False, False]

    def test_an_elementwise_product_of_grams_is_not(self) -> None:
        # It is symmetric, but does not commute with its factors.
        program = lowered((A, G.T * G), (B, sp.HadamardProduct(A, A)), (A, A * B), (P, P - G * A))
        assert [product.symmetric for product in products(program)] == [True, False, False]

    def test_the_transpose_of_a_symmetric_matrix_is_itself(self) -> None:
        program = lowered((A, G.T * G), (P, P - G * A.T * A))
        assert not any(isinstance(each, Transpose) for each in program.statements)

    def test_a_transpose_on_the_right_is_made(self) -> None:
        program = lowered((B, P.T * G), (P, P - G * B.T))
        assert [type(each) for each in program.statements] == [Product, Transpose, Product, Elementwise]

    def test_factors_that_are_sums_are_named(self) -> None:
        program = lowered((P, P - (G + P) * G.T * (G - P)))
        kinds = [type(each) for each in program.statements]
        assert kinds == [Elementwise, Transpose, Product, Elementwise, Product, Elementwise]


class TestNumbers:
    def test_what_only_the_group_changes_is_computed_once_a_step(self) -> None:
        program = lowered((P, (1 - LR * BETA) * P - LR * G))
        assert {value for _, value in program.scalars} == {1 - LR * BETA, -LR}
        (statement,) = program.statements
        assert isinstance(statement, Elementwise)

    def test_what_the_block_changes_is_computed_once_a_block(self) -> None:
        norm = sp.Symbol("norm", real=True)
        program = lowered((norm, sp.sqrt(sp.Trace(G.T * G))), (P, P - LR * sp.sqrt(height) / norm * G))
        assert [type(each) for each in program.statements] == [Sum, Number, Number, Elementwise]
        read = program.statements[-1].expression.free_symbols  # type: ignore[union-attr]
        assert not read & {height, width, program.statements[1].target}

    def test_a_trace_of_two_matrices(self) -> None:
        (total, *_) = lowered((P, sp.Trace(G * P.T) * P)).statements
        assert isinstance(total, Sum)
        assert {symbol.name for symbol in total.expression.free_symbols} == {"G", "P"}


@pytest.mark.parametrize(
    ("times", "equations", "message"),
    [(0, ((P, G),), "once or more"), (2, (Repeat(2, ((P, 2 * P),)),), "no other Repeat")],
    ids=["never", "nested"],
)
def test_loops_that_are_refused(times: int, equations: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Repeat(times, equations)


class TestNames:
    def test_no_two_values_have_one_name(self) -> None:
        m1, x1, n1 = (sp.MatrixSymbol(name, height, width) for name in ("M1", "x1", "n1"))
        equations: list[Any] = [(M, G), (m1, P), (x1, G), (n1, P)]
        equations += [(value, value + G * m1.T * P / sp.sqrt(sp.Trace(n1.T * x1))) for value in (M, m1, x1, n1) * 4]
        program = lowered(*equations, Repeat(12, ((M, M + m1), (m1, 2 * M))), (P, M + m1 + x1 + n1)).unrolled()
        targets = [each.target for each in program.statements] + [symbol for symbol, _ in program.scalars]  # type: ignore[union-attr]
        assert len(set(targets)) == len(targets)

    @pytest.mark.parametrize("state", [A, sp.Symbol("k", real=True)])
    def test_a_state_is_laid_out_as_the_blocks(self, state: Any) -> None:
        with pytest.raises(ValueError, match="laid out"):
            lowered((state, G.T * G), (P, P), states=[(state, "s")])


class TestOrder:
    def test_a_state_has_its_old_value_until_it_is_assigned(self) -> None:
        first = lowered((P, P - M), (M, G), states=[(M, "m")])
        second = lowered((M, G), (P, P - M), states=[(M, "m")])
        assert {symbol.name for symbol in first.statements[-1].expression.free_symbols} >= {"M", "P"}  # type: ignore[union-attr]
        assert "M" not in {symbol.name for symbol in second.statements[-1].expression.free_symbols}  # type: ignore[union-attr]

    def test_lowering_twice_gives_the_same(self) -> None:
        equations = ((M, BETA * M + G), (X, M / sp.sqrt(sp.Trace(M.T * M))), (P, P - LR * X * X.T * X))
        assert lowered(*equations, states=[(M, "m")]) == lowered(*equations, states=[(M, "m")])


class TestLoops:
    BODY = ((A, X.T * X), (X, X - BETA * X * A))

    def test_is_what_its_equations_written_out_are(self) -> None:
        looped = lowered((X, G), Repeat(3, self.BODY), (P, P - LR * X))
        written = lowered((X, G), *(self.BODY * 3), (P, P - LR * X))
        assert [type(each) for each in looped.statements] == [Elementwise, Loop, Elementwise]
        unrolled = looped.unrolled()
        assert len({each.target for each in unrolled.statements}) == len(unrolled.statements)  # type: ignore[union-attr]
        kinds = [type(each) for each in unrolled.statements if not isinstance(each, Elementwise)]
        assert kinds == [type(each) for each in written.statements if not isinstance(each, Elementwise)]

    def test_the_first_product_of_an_iteration_is_symmetric(self) -> None:
        program = lowered((X, G), Repeat(2, self.BODY), (P, P - LR * X)).unrolled()
        assert [product.symmetric for product in products(program)] == [True, False, True, False]

    def test_a_matrix_that_was_symmetric_before_is_not_known_to_stay_so(self) -> None:
        program = lowered((A, G.T * G), Repeat(2, ((B, A * A), (A, B * P.T * G))), (P, P - G * A))
        (loop,) = (each for each in program.statements if isinstance(each, Loop))
        assert not any(each.symmetric for each in loop.statements if isinstance(each, Product))

    def test_variables_change_all_at_once(self) -> None:
        program = lowered((X, G), (M, P), Repeat(2, ((B, M.T * M), (M, X), (X, X * B))), (P, X), states=[(M, "m")])
        (loop,) = (each for each in program.statements if isinstance(each, Loop))
        variables = {variable for variable, _ in loop.carried}
        assert len(variables) == 2
        assert any(value in variables for _, value in loop.carried)

    def test_numbers_of_an_iteration_are_computed_in_it(self) -> None:
        norm = sp.Symbol("norm", real=True)
        body = ((norm, sp.sqrt(sp.Trace(X.T * X))), (X, X / norm))
        program = lowered((X, G), (norm, sp.sqrt(height)), (X, X / norm), Repeat(2, body), (P, X / norm))
        (loop,) = (each for each in program.statements if isinstance(each, Loop))
        inside = {each.target for each in loop.statements}
        last = program.statements[-1]
        assert isinstance(last, Elementwise)
        assert not last.expression.free_symbols & inside


@pytest.mark.parametrize(
    ("equations", "message"),
    [
        ([(P, P - X)], "reads {X}"),
        ([(X, G)], "no equation assigns P"),
        ([(M, G), (P, P.T)], "another shape"),
        ([(A, G), (P, P)], "another shape"),
        ([(P, P - (G.T * G).inverse() * 0 * 0 - G * (G.T * G).inverse())], "whole positive exponent"),
        ([(P, P.applyfunc(sp.exp))], "elementwise product"),
        ([(P, sp.Trace(A) * P), (A, A)], "reads {A}"),
        ([(A, G.T * G), (P, sp.Trace(A) * P)], "Trace"),
        ([(A, G.T * G), (P, sp.Trace(A.T * A.T) * P)], "Trace"),
        ([(A, G.T * G), (P, sp.Determinant(A) * P)], "no trace"),
        ([(P, G[0, 0] * P)], "no trace"),
        ([(X, G), (M, X), (X, X - M), (P, P - X)], "leave that matrix out"),
        ([(LR, LR / 2), (P, LR * P)], "is given"),
        ([Repeat(2, ((LR, LR / 2), (P, LR * P)))], "is given"),
        ([(sp.Symbol("double", real=True), LR), (P, P)], "means something else"),
        ([(sp.Symbol("lambda", real=True), LR), (P, P)], "means something else"),
        ([Repeat(2, ((X, G),)), (P, X)], "reads {X}"),
        ([(sp.MatrixSymbol("X_", height, width), G), (P, P)], "X_"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(equations: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(*equations)
