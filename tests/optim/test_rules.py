"""Rules print their equations, their worked example runs, and options that change equations make other rules."""

import doctest

import sympy as sp

from sylva_compile.optim import rules


def test_the_worked_example() -> None:
    result = doctest.testmod(rules)
    assert result.attempted > 5
    assert result.failed == 0


def test_equations_can_be_read() -> None:
    assert str(rules.sgd(momentum=True, nesterov=True)) == "\n".join(
        ["SGD", "    g = g + p*weight_decay", "    m = g + m*mu", "    p = -lr*(g + m*mu) + p"]
    )


def test_options_that_change_equations_make_other_rules() -> None:
    made = [rules.adam(decoupled=d, amsgrad=a, maximize=m) for d in (0, 1) for a in (0, 1) for m in (0, 1)]
    made += [rules.sgd(momentum=True, dampening=d, maximize=m) for d in (0, 1) for m in (0, 1)]
    made += [rules.rmsprop(momentum=m, centered=c) for m in (0, 1) for c in (0, 1)]
    assert len({rule.equations for rule in made}) == len(made)


def test_every_symbol_is_explained() -> None:
    for rule in (rules.adam(decoupled=True), rules.sgd(momentum=True, dampening=True), rules.lion()):
        known = {symbol for symbol, _ in (*rule.states, *rule.hyperparameters)} | set(sp.symbols("p g t", real=True))
        assigned = {left for left, _ in rule.equations}
        assert set().union(*(right.free_symbols for _, right in rule.equations)) <= known | assigned
