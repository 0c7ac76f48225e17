"""From an update rule's equations to what a kernel computes: scalars once, then a few statements an element.

A rule is written as in its paper. Three things are done to it here, in this order:

1. What depends on no element (`lr / (1 - beta1**t)`) is taken out and computed once a parameter and step, in float64.
2. Subexpressions that occur twice get a name (`sympy.cse`).
3. Every assignment of an equation becomes a name of its own, so that the order of the statements is the rule's.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy as sp

p, g, t = sp.symbols("p g t", real=True)
"""The parameter, its gradient, and the number of the step, from 1."""


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        name: for people.
        equations: `(left, right)` in order. A left side is a state, an intermediate value, or `p`. A name on a
            right side means its newest value, as in a program.
        states: the state symbols with the names that checkpoints know them by; all of them start at zero.
        hyperparameters: every other symbol with the option of the parameter group that it stands for, such as `"lr"` or
            `("betas", 0)`.
    """

    name: str
    equations: tuple[tuple[sp.Symbol, sp.Expr], ...]
    states: tuple[tuple[sp.Symbol, str], ...]
    hyperparameters: tuple[tuple[sp.Symbol, str | tuple[str, int]], ...]

    @property
    def counts_steps(self) -> bool:
        """Whether the equations speak of the number of the step."""
        return any(right.has(t) for _, right in self.equations)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"    {left} = {right}" for left, right in self.equations)])


@dataclass(frozen=True)
class Program:
    """A rule, lowered.

    Attributes:
        rule: where it comes from.
        scalars: `(symbol, expression)` of hyperparameters and `t`.
        statements: `(symbol, expression)` an element, each symbol assigned once; of scalars, `p`, `g` and states.
        results: the symbol that holds the new value of `p`, then that of each state in the rule's order.
    """

    rule: Rule
    scalars: tuple[tuple[sp.Symbol, sp.Expr], ...]
    statements: tuple[tuple[sp.Symbol, sp.Expr], ...]
    results: tuple[sp.Symbol, ...]


def lower(rule: Rule) -> Program:
    """Lower `rule`.

    Raises:
        ValueError: a symbol is neither a state, a hyperparameter, nor assigned before it is read; a state or `p` is
            never assigned; or a name is none that generated code can use.
    """
    states = [symbol for symbol, _ in rule.states]
    constants = {symbol for symbol, _ in rule.hyperparameters} | {t}
    for symbol in {*states, *constants, *(left for left, _ in rule.equations)}:
        if not symbol.name.isidentifier() or not symbol.name.isascii() or symbol.name.endswith("_"):
            raise ValueError(f"{rule.name}: name {symbol} in letters, digits and _ (not at the end, which is ours).")
    newest: dict[sp.Symbol, sp.Symbol] = {symbol: symbol for symbol in (p, g, *states)}
    scalars: dict[sp.Expr, sp.Symbol] = {}
    statements: list[tuple[sp.Symbol, sp.Expr]] = []
    for left, right in rule.equations:
        unknown = right.free_symbols - newest.keys() - constants
        if unknown:
            raise ValueError(f"{rule.name}: {left} is made from {unknown}, which nothing defines before.")
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
    """`expression` with its largest parts that depend on `constants` alone replaced by symbols, noted in `scalars`."""
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
    """The statements, with what several of them compute named once, right before its first use."""
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
