"""The generated functions of rules over blocks."""

import sympy as sp

from sylva_compile.kernels.step.matrix_program import (
    Elementwise,
    Loop,
    MatrixProgram,
    Number,
    Plain,
    Product,
    Statement,
    Sum,
    Transpose,
)
from sylva_compile.kernels.step.printing import CppPrinter, TritonPrinter, as_tuple

TRITON_IMPORTS = ("from sylva_compile.kernels.step import triton_block_parts as blocks",)


def cpp_update(program: MatrixProgram) -> list[str]:
    """Return the lines of C++: the constants BUFFERS and RESULTS, and the function `update`, which steps one block."""
    program = program.unrolled()
    places, buffers = _places(program)
    results = ", ".join(str(places[symbol]) for symbol in program.results)
    return [
        f"constexpr int BUFFERS = {buffers}, RESULTS[] = {{{results}}};",
        "",
        "// Once a block of `n_ x n_` elements; each matrix is `side_ x side_`.",
        "template <typename T>",
        "static void update(int64_t n_, int64_t side_, [[maybe_unused]] T height, [[maybe_unused]] T width, "
        "[[maybe_unused]] const T* s_, T* const* m_) {",
        "  const int64_t count_ = side_ * side_;",
        *(f"  const T {symbol} = s_[{k}];" for k, (symbol, _) in enumerate(program.scalars)),
        *(f"  {line}" for each in program.statements if not isinstance(each, Loop) for line in _cpp(each, places)),
        "}",
        "",
    ]


def _cpp(statement: Plain, places: dict[sp.Symbol, int]) -> list[str]:
    """Return the C++ lines of one statement."""
    printer = CppPrinter("T")

    def at(symbol: sp.Symbol) -> str:
        return f"m_[{places[symbol]}]"

    def elements(expression: sp.Expr) -> str:
        matrices = expression.free_symbols & places.keys()
        return str(printer.doprint(expression.xreplace({each: sp.Symbol(f"{at(each)}[i_]") for each in matrices})))

    match statement:
        case Product(target, left, right, transposed, symmetric):
            kind = "multiply_symmetric" if symmetric else "multiply"
            flag = "true" if transposed else "false"
            return [f"{kind}<T, {flag}>(n_, side_, {at(left)}, {at(right)}, {at(target)});  // {target}"]
        case Transpose(target, source):
            return [f"transpose(side_, {at(source)}, {at(target)});  // {target}"]
        case Elementwise(target, expression):
            loop = f"for (int64_t i_ = 0; i_ < count_; ++i_) {at(target)}[i_] = {elements(expression)};  // {target}"
            return ["#pragma omp simd", loop]
        case Sum(target, expression):
            loop = f"for (int64_t i_ = 0; i_ < count_; ++i_) {target} += {elements(expression)};"
            return [f"T {target} = 0;", f"#pragma omp simd reduction(+ : {target})", loop]
        case Number(target, expression):
            return [f"const T {target} = {printer.doprint(expression)};"]


def _places(program: MatrixProgram) -> tuple[dict[sp.Symbol, int], int]:
    """Return the buffer of every matrix, and the number of buffers; a buffer is used again when its matrix is not read.

    The program has no loops. The buffers of `P`, `G` and the states are the first ones.
    """
    last: dict[sp.Symbol, int] = dict.fromkeys(program.results, len(program.statements))
    statements = [each for each in program.statements if not isinstance(each, Loop)]
    for at, statement in enumerate(statements):
        for symbol in _reads(statement):
            last[symbol] = max(last.get(symbol, at), at)
    places = {symbol: place for place, symbol in enumerate(program.inputs)}
    buffers = len(places)
    free = [place for symbol, place in places.items() if symbol not in last]
    for at, statement in enumerate(statements):
        ends = [places[symbol] for symbol in _reads(statement) if symbol in places and last[symbol] == at]
        if isinstance(statement, Elementwise):
            # It reads and writes the same element, so its result may take the place of what it reads.
            free += ends
        if isinstance(statement, Product | Transpose | Elementwise):
            if not free:
                free.append(buffers)
                buffers += 1
            places[statement.target] = free.pop()
            if statement.target not in last:
                free.append(places[statement.target])
        if not isinstance(statement, Elementwise):
            free += ends
    return places, buffers


def _reads(statement: Plain) -> list[sp.Symbol]:
    """Return the symbols that a statement reads, each once."""
    match statement:
        case Product(_, left, right):
            return list(dict.fromkeys((left, right)))
        case Transpose(_, source):
            return [source]
        case _:
            return sorted(statement.expression.free_symbols, key=str)


def triton_kernel(program: MatrixProgram, width: int) -> list[str]:
    """Return the lines of `update` and `step_kernel`; `width` is the number of columns of the address table."""
    rule = program.rule
    states = [symbol.name for symbol, _ in rule.states]
    scalars = [symbol.name for symbol, _ in program.scalars]
    arguments = ", ".join(["P", "G", *states, "height", "width", *scalars])
    body = [
        f"row_, start_, gradient_ = blocks.find_block(table_, gradients_, tiles_, {width})",
        "if (gradient_ != 0) & (tl.load(skip_) == 0):",
        "    top_, left_, height, width = blocks.place(row_, start_)",
        "    index_, inside_ = blocks.elements(row_, start_, height, width, SIDE_)",
        f"    hyper_ += parts.column(row_, parts.HYPER) * {len(rule.hyperparameters)}",
        "    t = parts.load_step(row_)",
        *([f"    {as_tuple(scalars)} = scalars(hyper_, blocks.own_step(row_, start_, t, AGES_))"] if scalars else []),
        "    P = parts.load(parts.column(row_, parts.PARAM), parts.column(row_, parts.PARAM_TYPE), index_, inside_)",
        "    G = parts.load(gradient_, parts.column(row_, parts.GRAD_TYPE), index_, inside_)",
        "    G *= tl.load(scale_).to(tl.float32)",
        *(f"    {name} = parts.load_state(row_, {k}, index_, inside_)" for k, name in enumerate(states)),
        f"    {as_tuple(['P', *states])} = update({arguments}, SIDE_, PRODUCTS_)",
        "    blocks.store_parameter(row_, top_, left_, index_, inside_, P, SIDE_)",
        *(f"    parts.store_state(row_, {k}, index_, inside_, {name}, seed_, t)" for k, name in enumerate(states)),
    ]
    return [
        "# Once a block, whose elements outside of its weight are zero.",
        "@triton.jit",
        f"def update({arguments}, SIDE_: tl.constexpr, PRODUCTS_: tl.constexpr):",
        "    height, width = height.to(tl.float32), width.to(tl.float32)",
        *(f"    {line}" for statement in program.statements for line in _triton(statement)),
        f"    return {as_tuple([symbol.name for symbol in program.results])}",
        "",
        "",
        "@triton.jit",
        "def step_kernel(",
        "    table_, gradients_, hyper_, tiles_, scale_, skip_, seed_,",
        "    SIDE_: tl.constexpr, PRODUCTS_: tl.constexpr, AGES_: tl.constexpr,",
        "):",
        *(f"    {line}" for line in body),
    ]


def _triton(statement: Statement) -> list[str]:
    """Return the lines of Triton of one statement. A loop stays a loop: unrolled, it takes minutes to compile."""
    match statement:
        case Product(target, left, right, transposed):
            return [
                f"{target} = blocks.multiply({f'tl.trans({left})' if transposed else left}, {right}, SIDE_, PRODUCTS_)"
            ]
        case Transpose(target, source):
            return [f"{target} = tl.trans({source})"]
        case Sum(target, expression):
            return [f"{target} = tl.sum({TritonPrinter(wide=False).doprint(expression)})"]
        case Loop(times, statements, carried):
            lines = [line for each in statements for line in _triton(each)]
            if carried:
                variables, values = ([symbol.name for symbol in symbols] for symbols in zip(*carried, strict=True))
                lines.append(f"{as_tuple(variables)} = {as_tuple(values)}")
            return [f"for _ in range({times}):", *(f"    {line}" for line in lines)]
        case _:
            return [f"{statement.target} = {TritonPrinter(wide=False).doprint(statement.expression)}"]
