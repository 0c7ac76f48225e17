"""Expressions in C++, Triton and torch: sympy's printers, adjusted to what the generated kernels use."""

from collections.abc import Sequence
from typing import Any

import sympy as sp
from sympy.printing.cxx import CXX17CodePrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pycode import PythonCodePrinter


class _SharedPrinter:
    """The printing that all target languages share: powers as products and roots, functions by name."""

    def number(self, value: str) -> str:
        raise NotImplementedError

    def call(self, name: str, *arguments: str) -> str:
        raise NotImplementedError

    def _print_Pow(self, expression: sp.Pow, **_: Any) -> str:  # noqa: N802 (sympy's dispatch)
        printer: Any = self
        base, power = expression.args
        if power == sp.Rational(1, 2):
            return self.call("sqrt", printer._print(base))
        if power.is_negative:
            below = printer.parenthesize(base**-power, PRECEDENCE["Pow"])
            return f"({self.number('1')} / {below})"
        if power.is_Integer and power <= 4:
            factor = printer.parenthesize(base, PRECEDENCE["Mul"] + 1)
            return f"({' * '.join([factor] * int(power))})"
        return self.call("pow", printer._print(base), printer._print(power))

    def _print_Integer(self, expression: sp.Integer) -> str:  # noqa: N802
        return self.number(str(int(expression)))

    def _print_Rational(self, expression: sp.Rational) -> str:  # noqa: N802
        return self.number(repr(float(expression)))

    def _print_Float(self, expression: sp.Float) -> str:  # noqa: N802
        return self.number(repr(float(expression)))

    def _print_Max(self, expression: sp.Max) -> str:  # noqa: N802
        printer: Any = self
        first, *rest = [printer._print(argument) for argument in expression.args]
        for other in rest:
            first = self.call("maximum", first, other)
        return str(first)

    def _print_sign(self, expression: Any) -> str:
        printer: Any = self
        return self.call("sign", printer._print(expression.args[0]))


class CppPrinter(_SharedPrinter, CXX17CodePrinter):  # type: ignore[misc]
    """Prints C++ over the type `real`."""

    def __init__(self, real: str) -> None:
        super().__init__()
        self._real = real

    def number(self, value: str) -> str:
        """Return a constant."""
        return f"{self._real}({value})"

    def call(self, name: str, *arguments: str) -> str:
        """Return a call of the function that C++ has for `name`."""
        place = "std::" if name in ("sqrt", "pow") else ""
        return f"{place}{name}({', '.join(arguments)})"


class _PythonPrinter(_SharedPrinter, PythonCodePrinter):  # type: ignore[misc]
    """The printing that Triton and torch share: a `Piecewise` becomes `where`."""

    where = ""

    def _print_Piecewise(self, expression: sp.Piecewise) -> str:  # noqa: N802
        *cases, (last, _) = expression.args
        text = self._print(last)
        for value, condition in reversed(cases):
            text = f"{self.where}({self._print(condition)}, {self._print(value)}, {text})"
        return str(text)


class TritonPrinter(_PythonPrinter):
    """Prints Triton over float32, or over float64 if `wide`."""

    where = "tl.where"

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self._dtype = "tl.float64" if wide else "tl.float32"

    def number(self, value: str) -> str:
        """Return a constant."""
        return f"tl.full((), {value}, {self._dtype})"

    def call(self, name: str, *arguments: str) -> str:
        """Return a call of the function that Triton has for `name`."""
        known = {"sqrt": "tl.sqrt" if self._dtype == "tl.float64" else "tl.sqrt_rn", "pow": "power"}
        return f"{known.get(name, name)}({', '.join(arguments)})"


class _TorchPrinter(_PythonPrinter):
    """Prints torch operations, for any dtype."""

    where = "torch.where"

    def number(self, value: str) -> str:
        return value

    def call(self, name: str, *arguments: str) -> str:
        if name == "maximum":
            # It takes tensors alone, and an argument may be a number.
            arguments = tuple(f"torch.as_tensor({argument})" for argument in arguments)
        return f"torch.{name}({', '.join(arguments)})"


def torch_expression(expression: sp.Expr) -> str:
    """Return `expression` in Python, over tensors that have its symbols' names."""
    return str(_TorchPrinter().doprint(expression))


def as_tuple(names: Sequence[str]) -> str:
    """Return a Python tuple of variables, without brackets."""
    return ", ".join(names) + ("," if len(names) == 1 else "")
