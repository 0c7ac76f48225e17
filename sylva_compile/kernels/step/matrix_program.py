"""The program of a rule over blocks: products, transposes, elementwise statements, sums, numbers and loops."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy as sp

from sylva_compile.kernels.step.lowering import G, P, Rule


@dataclass(frozen=True)
class Product:
    """`target = left · right`, or `leftᵀ · right` if `transposed`; `symmetric` if the product is known to be so."""

    target: sp.Symbol
    left: sp.Symbol
    right: sp.Symbol
    transposed: bool
    symmetric: bool


@dataclass(frozen=True)
class Transpose:
    """`target = sourceᵀ`."""

    target: sp.Symbol
    source: sp.Symbol


@dataclass(frozen=True)
class Elementwise:
    """`target = expression`, element by element; symbols stand for elements of matrices and for numbers."""

    target: sp.Symbol
    expression: sp.Expr


@dataclass(frozen=True)
class Sum:
    """`target =` the sum of `expression` over the elements of a block; a number for each block."""

    target: sp.Symbol
    expression: sp.Expr


@dataclass(frozen=True)
class Number:
    """`target = expression`, a number for each block, of other such numbers, `height` and `width`."""

    target: sp.Symbol
    expression: sp.Expr


Plain = Product | Transpose | Elementwise | Sum | Number


@dataclass(frozen=True)
class Loop:
    """Statements that run `times` times.

    Attributes:
        times: the number of iterations, at least 1.
        statements: the statements of one iteration.
        carried: `(variable, next)`: an iteration reads `variable`, and the next one finds there what `next` held at the
            end of this one. All variables change at once. They hold the last values after the loop.
    """

    times: int
    statements: tuple[Plain, ...]
    carried: tuple[tuple[sp.Symbol, sp.Symbol], ...]


Statement = Plain | Loop


@dataclass(frozen=True)
class MatrixProgram:
    """A lowered rule over blocks.

    Attributes:
        rule: the rule it was lowered from.
        scalars: `(symbol, expression)` over hyperparameters and `t`, computed once a parameter and step.
        statements: in order, over `P`, `G`, states, scalars, `height`, `width` and earlier targets. A matrix goes by a
            symbol of its name. Each target is assigned once, and changed by loops alone.
        results: the symbols of the new values of `P` and of the states, in the rule's order.
    """

    rule: Rule
    scalars: tuple[tuple[sp.Symbol, sp.Expr], ...]
    statements: tuple[Statement, ...]
    results: tuple[sp.Symbol, ...]

    @property
    def inputs(self) -> tuple[sp.Symbol, ...]:
        """The symbols of `P`, `G` and the states, in the rule's order."""
        return tuple(map(named, (P, G, *(state for state, _ in self.rule.states))))

    def unrolled(self) -> "MatrixProgram":
        """Return the same program without loops, in which each target is assigned once."""
        newest: dict[sp.Symbol, sp.Symbol] = {}
        statements: list[Statement] = []

        def add(statement: Plain, suffix: str) -> None:
            renamed = _renamed(statement, newest, suffix)
            newest[statement.target] = renamed.target
            statements.append(renamed)

        for each in self.statements:
            if not isinstance(each, Loop):
                add(each, "")
                continue
            for turn in range(each.times):
                for statement in each.statements:
                    add(statement, f"r{turn}_")
                # All at once: a variable may take what another one held.
                newest.update({variable: newest.get(value, value) for variable, value in each.carried})
        return replace(
            self,
            statements=tuple(statements),
            results=tuple(newest.get(symbol, symbol) for symbol in self.results),
        )


def named(symbol: sp.MatrixSymbol) -> sp.Symbol:
    """Return the symbol by which a program knows a matrix of the rule."""
    return sp.Symbol(symbol.name, real=True)


def _renamed(statement: Plain, names: Mapping[sp.Symbol, sp.Symbol], suffix: str) -> Plain:
    """Return `statement` with the symbols that it reads renamed, and with `suffix` at the end of its target's name."""
    target = sp.Symbol(f"{statement.target.name}{suffix}", real=True)
    match statement:
        case Product(_, left, right):
            return replace(statement, target=target, left=names.get(left, left), right=names.get(right, right))
        case Transpose(_, source):
            return Transpose(target, names.get(source, source))
        case _:
            return replace(statement, target=target, expression=statement.expression.xreplace(names))
