"""Lowers a rule over blocks to a program of products, sums and elementwise statements.

The equations of such a rule are matrix expressions: sums, multiples by numbers, products, powers, transposes,
elementwise products (`HadamardProduct`) and traces. Lowering does four things to them:

1. It hoists expressions of hyperparameters and `t`: kernels compute them once a parameter and step, in float64.
2. It names every product and trace. What is left of an equation acts on each element alone, and becomes one statement
   in which a symbol stands for the element of a matrix.
3. It marks products that are symmetric, of which a kernel computes one half: `X.T * X`, and the product of two
   polynomials in one symmetric matrix.
4. It computes numbers of a block (norms, functions of its size) once a block.
"""

import itertools
from collections.abc import Sequence

import sympy as sp

from sylva_compile.kernels.step.lowering import G, P, Repeat, Rule, check_names, height, hoist, numbered, t, width
from sylva_compile.kernels.step.matrix_program import (
    Elementwise,
    Loop,
    MatrixProgram,
    Number,
    Product,
    Statement,
    Sum,
    Transpose,
    named,
)


def lower_matrices(rule: Rule) -> MatrixProgram:
    """Lower a rule over blocks to a program.

    Raises:
        ValueError: a symbol is neither a state nor a hyperparameter and is read before it is assigned; a state or `P`
            is never assigned; shapes do not agree; generated code cannot use a symbol's name; or an equation holds an
            operation that is none of those named above.
    """
    check_names(rule)
    for state, _ in rule.states:
        if not isinstance(state, sp.MatrixSymbol) or state.shape != P.shape:
            raise ValueError(f"{rule.name}: {state} is no matrix of height x width; a state is laid out as the blocks.")
    return _Lowering(rule).program()


class _Lowering:
    """The state of lowering one rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._constants = {symbol for symbol, _ in rule.hyperparameters} | {t}
        self._scalars: dict[sp.Expr, sp.Symbol] = {}
        self._numbers: dict[sp.Expr, sp.Symbol] = {}
        self._statements: list[Statement] = []
        self._count = itertools.count()
        # The symbol that holds the newest value of each name of the rule.
        self._newest = {symbol: named(symbol) for symbol in (P, G, *(state for state, _ in rule.states))}
        self._block_numbers = {height, width}
        # For each symmetric matrix the one of which it is a polynomial; polynomials in one matrix commute.
        self._polynomial_in: dict[sp.Symbol, sp.Symbol] = {}

    def program(self) -> MatrixProgram:
        kept = [P, *(state for state, _ in self._rule.states)]
        for each in self._rule.equations:
            if isinstance(each, Repeat):
                self._loop(each)
            else:
                self._equation(*each)
        assigned = {left for left, _ in self._rule.each_equation()}
        if still := [symbol.name for symbol in kept if symbol not in assigned]:
            raise ValueError(f"{self._rule.name}: no equation assigns {', '.join(still)}.")
        return MatrixProgram(
            self._rule,
            tuple((symbol, expression) for expression, symbol in self._scalars.items()),
            tuple(self._statements),
            tuple(self._newest[symbol] for symbol in kept),
        )

    def _equation(self, left: sp.Expr, right: sp.Expr) -> None:
        if left in self._constants | {height, width, G}:
            raise ValueError(f"{self._rule.name}: {left} is given; assign to a symbol of another name.")
        unknown = right.free_symbols - self._newest.keys() - self._constants - {height, width}
        if unknown:
            raise ValueError(f"{self._rule.name}: {left} reads {unknown}, which no equation before it assigns.")
        is_matrix = isinstance(left, sp.MatrixSymbol)
        if is_matrix != isinstance(right, sp.MatrixExpr) or (is_matrix and left.shape != right.shape):
            raise ValueError(f"{self._rule.name}: {left} = {right} assigns a value of another shape.")
        value = self._elements(right)
        has_symbol = is_matrix and isinstance(value, sp.Symbol)
        self._newest[left] = value if has_symbol else self._assign(left.name, value, is_matrix=is_matrix)

    def _loop(self, repeat: Repeat) -> None:
        known = [left for left, _ in repeat.equations if left in self._newest]
        variables: dict[sp.Expr, sp.Symbol] = {}
        for left in dict.fromkeys(known):
            # A variable of its own: other names may stand for the same value.
            is_matrix = isinstance(left, sp.MatrixSymbol)
            variables[left] = self._assign(left.name, self._newest[left], is_matrix=is_matrix)
            self._polynomial_in.pop(variables[left], None)
        before, outside, numbers = dict(self._newest), self._statements, self._numbers
        self._newest.update(variables)
        self._statements, self._numbers = [], {}
        for equation in repeat.equations:
            self._equation(*equation)
        carried = tuple((variable, self._newest[left]) for left, variable in variables.items())
        loop = Loop(repeat.times, tuple(self._statements), carried)  # type: ignore[arg-type]
        self._statements, self._numbers = [*outside, loop], numbers
        self._newest = before | variables

    def _assign(self, name: str, value: sp.Expr, *, is_matrix: bool) -> sp.Symbol:
        """Return a new symbol that a new statement gives `value`."""
        value = hoist(value, self._constants, self._scalars)
        if not is_matrix:
            target = self._new(name)
            self._statements.append(Number(target, value))
            self._block_numbers.add(target)
            return target
        value = self._hoist_numbers(value)
        if value.free_symbols <= self._block_numbers | set(self._scalars.values()):
            raise ValueError(f"{self._rule.name}: all elements of {name} are {value}; leave that matrix out.")
        target = self._new(name)
        self._note_symmetry(target, value)
        self._statements.append(Elementwise(target, value))
        return target

    def _new(self, name: str) -> sp.Symbol:
        """Return a symbol for the next value of the rule's symbol `name`."""
        return numbered(name, next(self._count))

    def _made(self, kind: str) -> sp.Symbol:
        """Return a symbol for a value that the rule has no symbol for: a matrix "x" or a number "n"."""
        return sp.Symbol(f"{kind}{next(self._count)}_", real=True)

    def _hoist_numbers(self, value: sp.Expr) -> sp.Expr:
        """Take out of an elementwise expression what is one number for the whole block."""
        numbers = self._block_numbers | set(self._scalars.values())
        known = len(self._numbers)
        value = hoist(value, numbers, self._numbers, prefix=f"n{next(self._count)}x")
        for expression, symbol in list(self._numbers.items())[known:]:
            if not expression.is_Symbol:
                self._statements.append(Number(symbol, expression))
                self._block_numbers.add(symbol)
        return value.xreplace({symbol: each for each, symbol in self._numbers.items() if each.is_Symbol})

    def _elements(self, expression: sp.Expr) -> sp.Expr:
        """Return `expression` as one of elements and numbers; its products and traces become statements."""
        match expression:
            case sp.MatrixSymbol():
                return self._newest[expression]
            case sp.Trace():
                return self._trace(expression.arg)
            case sp.MatMul():
                number, factors = expression.as_coeff_matrices()
                value = self._elements(factors[0]) if len(factors) == 1 else self._product(factors)
                return self._elements(number) * value
            case sp.MatPow():
                return self._power(expression)
            case sp.Transpose():
                return self._transposed(self._matrix(expression.arg))
            case sp.MatAdd() | sp.HadamardProduct():
                kind = sp.Add if isinstance(expression, sp.MatAdd) else sp.Mul
                return kind(*map(self._elements, expression.args))
            case sp.MatrixExpr():
                raise ValueError(
                    f"{self._rule.name}: {expression} is no sum, multiple, product, transpose or elementwise product."
                )
            case sp.Symbol():
                return self._newest.get(expression, expression)
        if any(isinstance(part, sp.MatrixExpr) for part in expression.args):
            raise ValueError(f"{self._rule.name}: {expression} is a number of a matrix that is no trace.")
        return expression.func(*map(self._elements, expression.args)) if expression.args else expression

    def _matrix(self, expression: sp.MatrixExpr) -> sp.Symbol:
        """Return the symbol of a matrix that holds `expression`."""
        value = self._elements(expression)
        return value if isinstance(value, sp.Symbol) else self._assign("x", value, is_matrix=True)

    def _product(self, factors: Sequence[sp.MatrixExpr]) -> sp.Symbol:
        """Return the symbol of the product of two `factors` or more, taken from left to right."""
        first, *rest = factors
        if isinstance(first, sp.Transpose):
            left = self._matrix(first.arg)
            product = self._multiply(left, self._matrix(rest[0]), transposed=left not in self._polynomial_in)
            rest = rest[1:]
        else:
            product = self._matrix(first)
        for factor in rest:
            product = self._multiply(product, self._matrix(factor), transposed=False)
        return product

    def _power(self, expression: sp.MatPow) -> sp.Symbol:
        if not (expression.exp.is_Integer and expression.exp > 0):
            raise ValueError(f"{self._rule.name}: {expression} is no power with a whole positive exponent.")
        base = product = self._matrix(expression.base)
        for _ in range(int(expression.exp) - 1):
            product = self._multiply(product, base, transposed=False)
        return product

    def _multiply(self, left: sp.Symbol, right: sp.Symbol, *, transposed: bool) -> sp.Symbol:
        target = self._made("x")
        root = self._polynomial_in.get(left)
        commute = root is not None and root == self._polynomial_in.get(right)
        symmetric = commute or (transposed and left == right)
        if symmetric:
            self._polynomial_in[target] = root if commute else target
        self._statements.append(Product(target, left, right, transposed, symmetric))
        return target

    def _transposed(self, matrix: sp.Symbol) -> sp.Symbol:
        if matrix in self._polynomial_in:
            return matrix
        target = self._made("x")
        self._statements.append(Transpose(target, matrix))
        return target

    def _trace(self, expression: sp.MatrixExpr) -> sp.Symbol:
        """Return the number `trace(Aᵀ·B)`, the sum of the elementwise product of A and B."""
        factors = expression.args if isinstance(expression, sp.MatMul) else ()
        if len(factors) != 2 or sum(isinstance(factor, sp.Transpose) for factor in factors) != 1:
            raise ValueError(f"{self._rule.name}: write a trace as Trace(A.T * B), not {sp.Trace(expression)}.")
        # trace(A·Bᵀ) is the same sum.
        one, other = (each.arg if isinstance(each, sp.Transpose) else each for each in factors)
        if one.shape != other.shape:
            raise ValueError(f"{self._rule.name}: the factors of {sp.Trace(expression)} have different shapes.")
        value = hoist(self._elements(one) * self._elements(other), self._constants, self._scalars)
        target = self._made("n")
        self._statements.append(Sum(target, self._hoist_numbers(value)))
        self._block_numbers.add(target)
        return target

    def _note_symmetry(self, target: sp.Symbol, value: sp.Expr) -> None:
        """Note that `target` is a polynomial in one symmetric matrix, if `value` shows it."""
        read = value.free_symbols - self._block_numbers - set(self._scalars.values())
        roots = {self._polynomial_in.get(symbol) for symbol in read}
        # A sum of multiples commutes with the matrix; an elementwise product does not.
        linear = value.is_polynomial(*read) and sp.Poly(value, *read).total_degree() <= 1 if read else False
        if linear and len(roots) == 1 and None not in roots and not sp.Poly(value, *read).eval(dict.fromkeys(read, 0)):
            self._polynomial_in[target] = roots.pop()
