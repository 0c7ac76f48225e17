"""Lowering takes out what no element changes, keeps the order of equations, and refuses what makes no sense."""

import pytest
import sympy as sp

from sylva_compile.kernels.step.lowering import Rule, g, lower, p, t

LR, BETA, M = sp.symbols("lr beta m", real=True)
HYPER = ((LR, "lr"), (BETA, "beta"))


def rule(*equations: tuple[sp.Symbol, sp.Expr], states: tuple[tuple[sp.Symbol, str], ...] = ((M, "m"),)) -> Rule:
    return Rule("Test", equations, states, HYPER)


def test_scalars_are_taken_out_whole() -> None:
    program = lower(rule((p, p - LR / (1 - BETA**t) * g), states=()))
    assert [value for _, value in program.scalars] == [-LR / (1 - BETA**t)]
    ((_, value),) = program.statements
    assert value.free_symbols == {p, g, program.scalars[0][0]}


def test_a_scalar_is_computed_once() -> None:
    program = lower(rule((M, BETA * M + (1 - BETA) * g), (p, p - (1 - BETA) * M)))
    values = [value for _, value in program.scalars]
    assert len(values) == len(set(values))


def test_the_order_of_equations_is_kept() -> None:
    before, after = lower(rule((p, p - M), (M, g))), lower(rule((M, g), (p, p - M)))
    assert before.statements[0][1] == p - M
    assert after.statements[1][1] == p - after.results[1]


def test_common_parts_are_named_before_their_first_use() -> None:
    program = lower(rule((M, sp.sqrt(g * M + 1)), (p, p - 1 / sp.sqrt(g * sp.Symbol("m", real=True) + 1))))
    defined = {p, g, M} | {symbol for symbol, _ in program.scalars}
    for symbol, value in program.statements:
        assert value.free_symbols <= defined
        defined.add(symbol)
    assert set(program.results) <= defined


@pytest.mark.parametrize(
    ("equations", "message"),
    [
        (((p, p - sp.Symbol("q", real=True)), (M, g)), "q"),
        (((p, p - g),), "no equation assigns m"),
        (((M, g),), "no equation assigns p"),
        (((sp.Symbol("double", real=True), g), (p, p - g), (M, g)), "double"),
        (((sp.Symbol("x_", real=True), g), (p, p - g), (M, g)), "x_"),
        (((sp.Symbol("β", real=True), g), (p, p - g), (M, g)), "β"),
    ],
)
def test_refuses(equations: tuple[tuple[sp.Symbol, sp.Expr], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lower(rule(*equations))


def test_no_two_values_have_one_name() -> None:
    m1, s, x = sp.symbols("m1 s x", real=True)
    equations = [(M, g), (m1, g), (s, BETA * g), (x, LR * g)] * 3 + [(p, sp.sqrt(M + m1) * (s + x) + sp.sqrt(M + m1))]
    program = lower(rule(*equations))
    names = [symbol for symbol, _ in (*program.scalars, *program.statements)]
    assert len(set(names)) == len(names)
