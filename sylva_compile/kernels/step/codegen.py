"""C++ and Triton source of an optimizer step, generated from a lowered rule.

Two functions of a kernel depend on the rule and are generated: `scalars`, which runs once a parameter and step, and
`update`, which runs once an element. The parts that all rules share (tables of addresses, dtypes, tiles, write-through)
are written by hand in `step.cpp` and `triton_parts.py`.
"""

from pathlib import Path
from typing import Any

import sympy as sp
from sympy.printing.cxx import CXX17CodePrinter
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.pycode import PythonCodePrinter

from sylva_compile.kernels.step.lowering import Program, Rule
from sylva_compile.kernels.step.table import COLUMNS, STATE_COLUMNS

_SHARED_CPP = Path(__file__).with_name("step.cpp")


class _Printer:
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


class _Cpp(_Printer, CXX17CodePrinter):  # type: ignore[misc]
    """Prints C++ over the type `real`."""

    def __init__(self, real: str) -> None:
        super().__init__()
        self._real = real

    def number(self, value: str) -> str:
        return f"{self._real}({value})"

    def call(self, name: str, *arguments: str) -> str:
        place = "std::" if name in ("sqrt", "pow") else ""
        return f"{place}{name}({', '.join(arguments)})"


class _Python(_Printer, PythonCodePrinter):  # type: ignore[misc]
    """The printing that Triton and torch share: a `Piecewise` becomes `where`."""

    where = ""

    def _print_Piecewise(self, expression: sp.Piecewise) -> str:  # noqa: N802
        *cases, (last, _) = expression.args
        text = self._print(last)
        for value, condition in reversed(cases):
            text = f"{self.where}({self._print(condition)}, {self._print(value)}, {text})"
        return str(text)


class _Triton(_Python):
    """Prints Triton over float32, or over float64 if `wide`."""

    where = "tl.where"

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self._dtype = "tl.float64" if wide else "tl.float32"

    def number(self, value: str) -> str:
        return f"tl.full((), {value}, {self._dtype})"

    def call(self, name: str, *arguments: str) -> str:
        known = {"sqrt": "tl.sqrt" if self._dtype == "tl.float64" else "tl.sqrt_rn", "pow": "power"}
        return f"{known.get(name, name)}({', '.join(arguments)})"


class _Torch(_Python):
    """Prints torch operations, for any dtype."""

    where = "torch.where"

    def number(self, value: str) -> str:
        return value

    def call(self, name: str, *arguments: str) -> str:
        return f"torch.{name}({', '.join(arguments)})"


def torch_expression(expression: sp.Expr) -> str:
    """Return `expression` in Python, over tensors that have its symbols' names."""
    return str(_Torch().doprint(expression))


def cpp_source(program: Program) -> str:
    """Return the whole C++ file: the two generated functions, then `step.cpp`."""
    rule = program.rule
    states = [symbol.name for symbol, _ in rule.states]
    lines = [
        *_header(rule, "//"),
        "#include <cmath>",
        "#include <cstdint>",
        "",
        f"enum Column {{ {', '.join(COLUMNS)} }};",
        f"constexpr int WIDTH = {table_width(rule)}, STATES = {len(states)}, STATE_COLUMNS = {len(STATE_COLUMNS)};",
        f"constexpr int HYPERPARAMETERS = {len(rule.hyperparameters)}, SCALARS = {len(program.scalars)};",
        "",
        "template <typename T> static inline T sign(T a) { return T(a > 0) - T(a < 0); }",
        "template <typename T> static inline T maximum(T a, T b) { return a > b || a != a ? a : b; }",
        "",
        "// Once a parameter and step.",
        "static void scalars(const double* hyper_, [[maybe_unused]] double t, double* s_) {",
    ]
    lines += [f"  const double {symbol} = hyper_[{k}];" for k, (symbol, _) in enumerate(rule.hyperparameters)]
    lines += [f"  s_[{k}] = {_Cpp('double').doprint(value)};" for k, (_, value) in enumerate(program.scalars)]
    lines += [
        "}",
        "",
        "// Once an element.",
        "template <typename T>",
        "static void update(int64_t n_, T scale_, [[maybe_unused]] const T* s_, T* __restrict p_, "
        "const T* __restrict g_, [[maybe_unused]] T* const* state_) {",
    ]
    lines += [f"  const T {symbol} = s_[{k}];" for k, (symbol, _) in enumerate(program.scalars)]
    lines += [f"  T* __restrict {name}_ = state_[{k}];" for k, name in enumerate(states)]
    lines += ["#pragma omp simd", "  for (int64_t i_ = 0; i_ < n_; ++i_) {"]
    lines += ["    const T p = p_[i_], g = g_[i_] * scale_;"]
    lines += [f"    const T {name} = {name}_[i_];" for name in states]
    lines += [f"    const T {symbol} = {_Cpp('T').doprint(value)};" for symbol, value in program.statements]
    lines += [f"    {name}_[i_] = {new};" for name, new in zip(["p", *states], program.results, strict=True)]
    lines += ["  }", "}", "", ""]
    return "\n".join(lines) + _SHARED_CPP.read_text()


def triton_source(program: Program) -> str:
    """Return the whole Triton module: the two generated functions and the kernel `step_kernel` around them."""
    rule = program.rule
    states = [symbol.name for symbol, _ in rule.states]
    hyper = [symbol.name for symbol, _ in rule.hyperparameters]
    once = program.scalars
    scalars = [symbol.name for symbol, _ in once]
    lines = [
        *_header(rule, "#"),
        "import triton",
        "import triton.language as tl",
        "",
        "from sylva_compile.kernels.step import triton_parts as parts",
        "from sylva_compile.kernels.step.triton_parts import maximum, power, sign",
        "",
        "",
        "# Once a parameter and step; every program computes those of its own parameter.",
        "@triton.jit",
        "def scalars(hyper_, t):",
    ]
    lines += [f"    {name} = tl.load(hyper_ + {k})" for k, name in enumerate(hyper)]
    lines += [
        f"    {symbol} = ({_Triton(wide=True).doprint(value)}).to(tl.float32)" for symbol, value in program.scalars
    ]
    lines += [
        f"    return {_tuple(scalars)}",
        "",
        "",
        "# Once an element.",
        "@triton.jit",
        f"def update({', '.join(['p', 'g', *states, *scalars])}):",
    ]
    lines += [f"    {symbol} = {_Triton(wide=False).doprint(value)}" for symbol, value in program.statements]
    lines += [f"    return {_tuple([symbol.name for symbol in program.results])}", "", "", "@triton.jit"]
    lines += ["def step_kernel(table_, gradients_, hyper_, tiles_, scale_, skip_, seed_, TILE_: tl.constexpr):"]
    body = [
        f"row_, start_, index_ = parts.find_tile(table_, tiles_, {table_width(rule)}, TILE_)",
        "gradient_ = tl.load(gradients_ + tl.load(tiles_ + 2 * tl.program_id(0)))",
        "if (gradient_ != 0) & (tl.load(skip_) == 0):",
        "    inside_ = parts.within_matrix(row_, start_, index_, TILE_)",
        f"    hyper_ += parts.column(row_, parts.HYPER) * {len(hyper)}",
        "    t = parts.load_step(row_)",
        *([f"    {_tuple(scalars)} = scalars(hyper_, t)"] if scalars else []),
        "    p = parts.load(parts.column(row_, parts.PARAM), parts.column(row_, parts.PARAM_TYPE), index_, inside_)",
        "    g = parts.load(gradient_, parts.column(row_, parts.GRAD_TYPE), index_, inside_)",
        "    g *= tl.load(scale_).to(tl.float32)",
        *(f"    {name} = parts.load_state(row_, {k}, index_, inside_)" for k, name in enumerate(states)),
        f"    {_tuple(['p', *states])} = update({', '.join(['p', 'g', *states, *scalars])})",
        "    parts.store_parameter(row_, start_, index_, inside_, p, TILE_)",
        *(f"    parts.store_state(row_, {k}, index_, inside_, {name}, seed_, t)" for k, name in enumerate(states)),
    ]
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


def table_width(rule: Rule) -> int:
    """Return the number of columns of the address table that a kernel of `rule` reads."""
    return len(COLUMNS) + len(STATE_COLUMNS) * len(rule.states)


def _tuple(names: list[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


def _header(rule: Rule, comment: str) -> list[str]:
    made = [f"The step of {rule.name}, generated by sylva_compile from", *str(rule).splitlines()[1:]]
    options = [
        f"{symbol} is {'.'.join(map(str, name)) if isinstance(name, tuple) else name}"
        for symbol, name in rule.hyperparameters
    ]
    states = [f"{symbol} is {name}" for symbol, name in rule.states]
    meanings = [f"    {meaning}" for meaning in (*options, *states)]
    return [f"{comment} {line}" for line in [*made, *(["where", *meanings] if meanings else [])]] + [""]
