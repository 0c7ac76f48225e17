"""Lowers an update rule's equations to the program of a kernel: scalars once, then a few statements an element.

A rule is written as in its paper. Lowering does three things to it, in this order:

1. It hoists expressions that depend on no element (`lr / (1 - beta1**t)`): kernels compute them once a parameter and
   step, in float64.
2. It gives every assignment a name of its own, so that the statements keep the order of the equations.
3. It names subexpressions that occur twice (`sympy.cse`).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy as sp

p, g, t = sp.symbols("p g t", real=True)
"""The parameter, its gradient, and the number of the step, which starts at 1."""


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: the rule's name in messages, profiles and generated source.
        equations: `(left, right)` in order. A left side is a state, an intermediate value, or `p`. A symbol on a
            right side has the value that the last equation before it assigned, as in a program.
        states: the state symbols with their names in checkpoints; every state starts at zero.
        hyperparameters: every other symbol with the option of the parameter group that holds its value, such as `"lr"`
            or `("betas", 0)`.
    """

    name: str
    equations: tuple[tuple[sp.Symbol, sp.Expr], ...]
    states: tuple[tuple[sp.Symbol, str], ...]
    hyperparameters: tuple[tuple[sp.Symbol, str | tuple[str, int]], ...]

    @property
    def counts_steps(self) -> bool:
        """Whether the equations read `t`, the number of the step."""
        return any(right.has(t) for _, right in self.equations)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"    {left} = {right}" for left, right in self.equations)])


@dataclass(frozen=True)
class Program:
    """A lowered rule.

    Attributes:
        rule: the rule it was lowered from.
        scalars: `(symbol, expression)` over hyperparameters and `t`, computed once a parameter and step.
        statements: `(symbol, expression)` over scalars, `p`, `g`, states and earlier symbols, computed once an element;
            each symbol is assigned once.
        results: the symbol that holds the new value of `p`, then those of the states in the rule's order.
    """

    rule: Rule
    scalars: tuple[tuple[sp.Symbol, sp.Expr], ...]
    statements: tuple[tuple[sp.Symbol, sp.Expr], ...]
    results: tuple[sp.Symbol, ...]


def lower(rule: Rule) -> Program:
    """Lower `rule` to a program.

    Raises:
        ValueError: a symbol is neither a state nor a hyperparameter and is read before it is assigned; a state or `p`
            is never assigned; or generated code cannot use a symbol's name.
    """
    states = [symbol for symbol, _ in rule.states]
    constants = {symbol for symbol, _ in rule.hyperparameters} | {t}
    for symbol in {*states, *constants, *(left for left, _ in rule.equations)}:
        if not symbol.name.isidentifier() or not symbol.name.isascii() or symbol.name.endswith("_"):
            raise ValueError(f"{rule.name}: name {symbol} in ASCII letters, digits and _, without _ at the end.")
    newest: dict[sp.Symbol, sp.Symbol] = {symbol: symbol for symbol in (p, g, *states)}
    scalars: dict[sp.Expr, sp.Symbol] = {}
    statements: list[tuple[sp.Symbol, sp.Expr]] = []
    for left, right in rule.equations:
        unknown = right.free_symbols - newest.keys() - constants
        if unknown:
            raise ValueError(f"{rule.name}: {left} reads {unknown}, which no equation before it assigns.")
        value = _hoist(right.xreplace(newest), constants, scalars)
        newest[left] = sp.Symbol(f"{left.name}{len(statements)}_", real=True)
        statements.append((newest[left], value))
    still = [symbol.name for symbol in (p, *states) if newest[symbol] is symbol]
    if still:
        raise ValueError(f"{rule.name}: no equation assigns {', '.join(still)}.")
    return Program(
        rule,
        tuple((symbol, expression) for expression, symbol in scalars.items()),
        _without_common_subexpressions(statements),
        tuple(newest[symbol] for symbol in (p, *states)),
    )


def _hoist(expression: sp.Expr, constants: set[sp.Symbol], scalars: dict[sp.Expr, sp.Symbol]) -> sp.Expr:
    """Replace the largest parts of `expression` that depend on `constants` alone by symbols; add those to `scalars`."""
    if not expression.free_symbols & constants:
        return expression
    if expression.free_symbols <= constants:
        return scalars.setdefault(expression, sp.Symbol(f"s{len(scalars)}_", real=True))
    parts = list(expression.args)
    if isinstance(expression, sp.Add | sp.Mul):
        apart = [part for part in parts if part.free_symbols <= constants]
        if any(part.free_symbols for part in apart):
            parts = [expression.func(*apart), *(part for part in parts if part not in apart)]
    return expression.func(*(_hoist(part, constants, scalars) for part in parts))


def _names() -> Iterator[sp.Symbol]:
    return (sp.Symbol(f"x{index}_", real=True) for index in itertools.count())


def _without_common_subexpressions(
    statements: Sequence[tuple[sp.Symbol, sp.Expr]],
) -> tuple[tuple[sp.Symbol, sp.Expr], ...]:
    """Return the statements with each common subexpression assigned once, right before its first use."""
    common, reduced = sp.cse([right for _, right in statements], _names(), order="none")
    waiting = dict(common)
    result: list[tuple[sp.Symbol, sp.Expr]] = []

    def need(expression: sp.Expr) -> None:
        for symbol in sorted(expression.free_symbols & waiting.keys(), key=str):
            value = waiting.pop(symbol)
            need(value)
            result.append((symbol, value))

    for (left, _), right in zip(statements, reduced, strict=True):
        need(right)
        result.append((left, right))
    return tuple(result)
