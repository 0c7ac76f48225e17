"""The generated functions of rules over elements."""

from sylva_compile.kernels.step.lowering import Program
from sylva_compile.kernels.step.printing import CppPrinter, TritonPrinter, as_tuple

TRITON_IMPORTS: tuple[str, ...] = ()


def cpp_update(program: Program) -> list[str]:
    """Return the lines of the C++ function `update`, which steps `n_` elements that lie side by side."""
    states = [symbol.name for symbol, _ in program.rule.states]
    printer = CppPrinter("T")
    return [
        "// Once an element.",
        "template <typename T>",
        "static void update(int64_t n_, T scale_, [[maybe_unused]] const T* s_, T* __restrict p_, "
        "const T* __restrict g_, [[maybe_unused]] T* const* state_) {",
        *(f"  const T {symbol} = s_[{k}];" for k, (symbol, _) in enumerate(program.scalars)),
        *(f"  T* __restrict {name}_ = state_[{k}];" for k, name in enumerate(states)),
        "#pragma omp simd",
        "  for (int64_t i_ = 0; i_ < n_; ++i_) {",
        "    const T p = p_[i_], g = g_[i_] * scale_;",
        *(f"    const T {name} = {name}_[i_];" for name in states),
        *(f"    const T {symbol} = {printer.doprint(value)};" for symbol, value in program.statements),
        *(f"    {name}_[i_] = {new};" for name, new in zip(["p", *states], program.results, strict=True)),
        "  }",
        "}",
        "",
    ]


def triton_kernel(program: Program, width: int) -> list[str]:
    """Return the lines of `update` and `step_kernel`; `width` is the number of columns of the address table."""
    rule = program.rule
    states = [symbol.name for symbol, _ in rule.states]
    scalars = [symbol.name for symbol, _ in program.scalars]
    arguments = ", ".join(["p", "g", *states, *scalars])
    printer = TritonPrinter(wide=False)
    own = "parts.own_steps(row_, start_, index_, t, TILE_, AGES_)"
    body = [
        f"row_, start_, index_ = parts.find_tile(table_, tiles_, {width}, TILE_)",
        "gradient_ = tl.load(gradients_ + tl.load(tiles_ + 2 * tl.program_id(0)))",
        "if (gradient_ != 0) & (tl.load(skip_) == 0):",
        "    inside_ = parts.within_matrix(row_, start_, index_, TILE_)",
        f"    hyper_ += parts.column(row_, parts.HYPER) * {len(rule.hyperparameters)}",
        "    t = parts.load_step(row_)",
        *([f"    {as_tuple(scalars)} = scalars(hyper_, {own})"] if scalars else []),
        "    p = parts.load(parts.column(row_, parts.PARAM), parts.column(row_, parts.PARAM_TYPE), index_, inside_)",
        "    g = parts.load(gradient_, parts.column(row_, parts.GRAD_TYPE), index_, inside_)",
        "    g *= tl.load(scale_).to(tl.float32)",
        *(f"    {name} = parts.load_state(row_, {k}, index_, inside_)" for k, name in enumerate(states)),
        f"    {as_tuple(['p', *states])} = update({arguments})",
        "    parts.store_parameter(row_, start_, index_, inside_, p, TILE_)",
        *(f"    parts.store_state(row_, {k}, index_, inside_, {name}, seed_, t)" for k, name in enumerate(states)),
    ]
    return [
        "# Once an element.",
        "@triton.jit",
        f"def update({arguments}):",
        *(f"    {symbol} = {printer.doprint(value)}" for symbol, value in program.statements),
        f"    return {as_tuple([symbol.name for symbol in program.results])}",
        "",
        "",
        "@triton.jit",
        "def step_kernel(",
        "    table_, gradients_, hyper_, tiles_, scale_, skip_, seed_, TILE_: tl.constexpr, AGES_: tl.constexpr",
        "):",
        *(f"    {line}" for line in body),
    ]
