"""Lowers an update rule's equations to the program of a kernel: scalars once, then a few statements an element.

A rule is written as in its paper, over elements (`p`, `g`) or over blocks as matrices (`P`, `G`); rules over matrices
are lowered by `matrix_lowering.py`. Lowering does three things to a rule over elements, in this order:

1. It hoists expressions that depend on no element (`lr / (1 - beta1**t)`): kernels compute them once a parameter and
   step, in float64.
2. It gives every assignment a name of its own, so that the statements keep the order of the equations.
3. It names subexpressions that occur twice (`sympy.cse`).
"""

import functools
import itertools
import keyword
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import sympy as sp
from sympy.printing.cxx import reserved

p, g, t = sp.symbols("p g t", real=True)
"""The parameter, its gradient, and the number of the step, which starts at 1."""

height, width = sp.symbols("height width", integer=True, positive=True)
"""The rows and columns of a block inside its weight: b, or fewer where the block reaches over the weight's edge."""

P, G = (sp.MatrixSymbol(name, height, width) for name in "PG")
"""A block of the parameter and of its gradient, each a matrix."""


Equation = tuple[sp.Expr, sp.Expr]
"""`(left, right)`; the left side is a symbol."""


@dataclass(frozen=True)
class Repeat:
    """Equations that run `times` times in order, once or more. A value that they are first to assign ends with them.

    Raises:
        ValueError: `times` is below 1, or one of the equations is a Repeat.
    """

    times: int
    equations: tuple[Equation, ...]

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"Equations repeat {self.times} times; repeat them once or more.")
        if any(isinstance(each, Repeat) for each in self.equations):
            raise ValueError("Equations of a Repeat hold no other Repeat; write them out.")


@dataclass(frozen=True)
class Rule:
    """An update rule, over elements or over blocks.

    Attributes:
        name: the rule's name in messages, profiles and generated source.
        equations: `(left, right)` in order. A left side is a state, an intermediate value, or the parameter. A symbol
            on a right side has the value that the last equation before it assigned, as in a program. A rule over
            elements assigns `p`. A rule over blocks assigns `P`; its states and other matrices are matrix symbols, and
            a plain symbol on a left side is one number for each block. A rule over blocks may `Repeat` equations.
        states: the state symbols with their names in checkpoints; every state starts at zero.
        hyperparameters: every other symbol with the option of the parameter group that holds its value, such as `"lr"`
            or `("betas", 0)`.
    """

    name: str
    equations: tuple[Equation | Repeat, ...]
    states: tuple[tuple[sp.Expr, str], ...]
    hyperparameters: tuple[tuple[sp.Symbol, str | tuple[str, int]], ...]

    def each_equation(self) -> Iterator[Equation]:
        """Yield every equation once, in order, those of a `Repeat` too."""
        for each in self.equations:
            yield from each.equations if isinstance(each, Repeat) else (each,)

    @functools.cached_property
    def counts_steps(self) -> bool:
        """Whether the equations read `t`, the number of the step."""
        return any(right.has(t) for _, right in self.each_equation())

    @functools.cached_property
    def is_over_blocks(self) -> bool:
        """Whether the equations assign `P`, a block as a matrix; such a rule steps parameters `[nnz, b, b]` alone."""
        return any(left == P for left, _ in self.each_equation())

    def __str__(self) -> str:
        lines = [self.name]
        for each in self.equations:
            if isinstance(each, Repeat):
                lines.append(f"    {each.times} times:")
                lines += [f"        {left} = {right}" for left, right in each.equations]
            else:
                lines.append("    {} = {}".format(*each))
        return "\n".join(lines)


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
            is never assigned; generated code cannot use a symbol's name; or equations are repeated.
    """
    states = [symbol for symbol, _ in rule.states]
    constants = {symbol for symbol, _ in rule.hyperparameters} | {t}
    check_names(rule)
    newest: dict[sp.Symbol, sp.Symbol] = {symbol: symbol for symbol in (p, g, *states)}
    scalars: dict[sp.Expr, sp.Symbol] = {}
    statements: list[tuple[sp.Symbol, sp.Expr]] = []
    for each in rule.equations:
        if isinstance(each, Repeat):
            raise ValueError(f"{rule.name}: a rule over elements repeats no equations; write them out.")
        left, right = each
        unknown = right.free_symbols - newest.keys() - constants
        if unknown:
            raise ValueError(f"{rule.name}: {left} reads {unknown}, which no equation before it assigns.")
        value = hoist(right.xreplace(newest), constants, scalars)
        newest[left] = numbered(left.name, len(statements))
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


_OF_KERNELS = "T t std tl triton parts blocks maximum power sign scalars update step_kernel height width"
_TAKEN = frozenset([*keyword.kwlist, *reserved["C++17"], *_OF_KERNELS.split()])
"""Words of Python and C++, and names that kernels use themselves."""


def numbered(name: str, number: int) -> sp.Symbol:
    """Return the symbol of a value of the rule's symbol `name`.

    No other symbol has its name: a rule's own names do not end with _, and no other generated name ends with _, digits
    and _.
    """
    return sp.Symbol(f"{name}_{number}_", real=True)


def check_names(rule: Rule) -> None:
    """Raise ValueError if generated code cannot use the name of one of the rule's symbols."""
    assigned = [left for left, _ in rule.each_equation()]
    for symbol in [symbol for symbol, _ in (*rule.states, *rule.hyperparameters)] + assigned:
        name = symbol.name
        if not name.isidentifier() or not name.isascii() or name.endswith("_"):
            raise ValueError(f"{rule.name}: name {symbol} in ASCII letters, digits and _, without _ at the end.")
        if name in _TAKEN:
            raise ValueError(f"{rule.name}: {symbol} means something else in generated code; use another name.")


def hoist(
    expression: sp.Expr, constants: Collection[sp.Symbol], scalars: dict[sp.Expr, sp.Symbol], prefix: str = "s"
) -> sp.Expr:
    """Replace the largest parts of `expression` that depend on `constants` alone by symbols; add those to `scalars`."""
    constants = set(constants)
    if not expression.free_symbols & constants:
        return expression
    if expression.free_symbols <= constants:
        return scalars.setdefault(expression, sp.Symbol(f"{prefix}{len(scalars)}_", real=True))
    parts = list(expression.args)
    if isinstance(expression, sp.Add | sp.Mul):
        apart = [part for part in parts if part.free_symbols <= constants]
        if any(part.free_symbols for part in apart):
            parts = [expression.func(*apart), *(part for part in parts if part not in apart)]
    return expression.func(*(hoist(part, constants, scalars, prefix) for part in parts))


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
