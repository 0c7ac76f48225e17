"""Lowering names products and traces, knows which products are symmetric, and refuses what it cannot lower."""

from collections.abc import Sequence
from typing import Any

import pytest
import sympy as sp

from sylva_compile.kernels.step.lowering import G, P, Rule, height, width
from sylva_compile.kernels.step.matrix_lowering import (
    Elementwise,
    MatrixProgram,
    Number,
    Product,
    Sum,
    Transpose,
    lower_matrices,
)

LR, BETA = sp.symbols("lr beta", real=True)
M, X = (sp.MatrixSymbol(name, height, width) for name in "MX")
A, B = (sp.MatrixSymbol(name, width, width) for name in "AB")
HYPER = ((LR, "lr"), (BETA, "beta"))


def lowered(*equations: tuple[Any, Any], states: Sequence[tuple[Any, str]] = ()) -> MatrixProgram:
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


class TestOrder:
    def test_a_state_has_its_old_value_until_it_is_assigned(self) -> None:
        first = lowered((P, P - M), (M, G), states=[(M, "m")])
        second = lowered((M, G), (P, P - M), states=[(M, "m")])
        assert {symbol.name for symbol in first.statements[-1].expression.free_symbols} >= {"M", "P"}  # type: ignore[union-attr]
        assert "M" not in {symbol.name for symbol in second.statements[-1].expression.free_symbols}  # type: ignore[union-attr]

    def test_lowering_twice_gives_the_same(self) -> None:
        equations = ((M, BETA * M + G), (X, M / sp.sqrt(sp.Trace(M.T * M))), (P, P - LR * X * X.T * X))
        assert lowered(*equations, states=[(M, "m")]) == lowered(*equations, states=[(M, "m")])


@pytest.mark.parametrize(
    ("equations", "message"),
    [
        ([(P, P - X)], "reads {X}"),
        ([(X, G)], "no equation assigns P"),
        ([(M, G), (P, P.T)], "another shape"),
        ([(A, G), (P, P)], "another shape"),
        ([(LR, G), (P, P)], "another shape"),
        ([(P, P - (G.T * G).inverse() * 0 * 0 - G * (G.T * G).inverse())], "whole positive exponent"),
        ([(P, P.applyfunc(sp.exp))], "elementwise product"),
        ([(P, sp.Trace(A) * P), (A, A)], "reads {A}"),
        ([(A, G.T * G), (P, sp.Trace(A) * P)], "Trace"),
        ([(sp.MatrixSymbol("X_", height, width), G), (P, P)], "X_"),
    ],
    ids=str,
)
def test_refuses(equations: list[tuple[Any, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(*equations)
