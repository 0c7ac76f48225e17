"""The optimizer step in torch's own operations, parameter by parameter, from the same lowered rule.

A rule over blocks steps all blocks of a parameter at once, by batched products.

It is the oracle of the generated kernels and their fallback: without a C++ compiler, on other kinds of device, for
float64 on a GPU and blocks that are too large there, for a parameter whose elements do not lie side by side in memory,
and for blocks whose dense weight a kernel cannot reach.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.step.lowering import Program, g, height, p, t, width
from sylva_compile.kernels.step.matrix_program import Loop, MatrixProgram, Plain, Product, Sum, Transpose
from sylva_compile.kernels.step.printing import torch_expression
from sylva_compile.kernels.step.table import Products, Slot

Values = dict[sp.Symbol, Any]
"""Tensors by the symbols of a program."""
Run = Callable[[Values], None]
"""A function that computes a statement from the values so far and adds its own."""


class EagerLaunch:
    """A `Launch` that computes in float32 or wider. The caller writes blocks through into their dense weights."""

    writes_by_address = False

    def __init__(
        self,
        program: Program | MatrixProgram,
        device: torch.device,
        *,
        stochastic: bool,
        products: Products = "float32",
    ) -> None:
        """Make functions of torch operations from the program.

        Args:
            program: the lowered rule.
            device: the device of the parameters.
            stochastic: round bfloat16 states stochastically.
            products: "bfloat16" rounds the factors of matrix products; "tf32" leaves the choice to torch's settings.
        """
        if isinstance(program, MatrixProgram):
            program = program.unrolled()
        self.device, self._program, self._stochastic = device, program, stochastic
        self._pairs: list[tuple[Slot, Tensor]] = []
        self._sizes: list[tuple[Tensor, Tensor] | None] = []
        self._scalars = [(symbol, _function(value)) for symbol, value in program.scalars]
        rounded = torch.bfloat16 if products == "bfloat16" else None
        self._statements: list[Run] = [
            _elementwise(*each) if isinstance(each, tuple) else _matrix_statement(each, rounded)
            for each in program.statements
            if not isinstance(each, Loop)
        ]

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Describe this step; see `Launch`."""
        pairs = [(slot, gradient) for slot, gradient in zip(slots, gradients, strict=True) if gradient is not None]
        over_blocks = isinstance(self._program, MatrixProgram)
        self._sizes = [_block_sizes(slot) if over_blocks else None for slot, _ in pairs]
        # A launch may outlive the model and must not keep its dense weights alive.
        self._pairs = [(slot._replace(target=None), gradient) for slot, gradient in pairs]

    def squares(self) -> Tensor:
        """Return one sum of squares a gradient; see `Launch`."""
        sums = [gradient.double().square().sum() for _, gradient in self._pairs]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=self.device)

    def step(self, hyper: Tensor, scale: Tensor, skip: Tensor, seed: int) -> None:
        """Step every parameter that has a gradient; see `Launch`."""
        for (slot, gradient), sizes in zip(self._pairs, self._sizes, strict=True):
            if slot.step is not None:
                slot.step.add_((skip == 0).to(slot.step.dtype))
            self._step_one(slot, gradient, sizes, hyper[slot.group], scale, skip, seed)

    def _step_one(
        self,
        slot: Slot,
        gradient: Tensor,
        sizes: tuple[Tensor, Tensor] | None,
        hyper: Tensor,
        scale: Tensor,
        skip: Tensor,
        seed: int,
    ) -> None:
        rule = self._program.rule
        wide = block_dtype(slot.param.dtype)
        once: Values = dict(zip((symbol for symbol, _ in rule.hyperparameters), hyper, strict=True))
        step = torch.ones((), dtype=torch.float64, device="cpu") if slot.step is None else slot.step.double()
        once[t] = step if slot.born is None else step - slot.born.double()[:, None, None]
        values: Values = {symbol: compute(once).to(wide) for symbol, compute in self._scalars}
        inputs: tuple[sp.Symbol, ...] = (p, g, *(symbol for symbol, _ in rule.states))
        given = (slot.param.to(wide), gradient.to(wide) * scale.to(wide), *(state.to(wide) for state in slot.states))
        changes = skip == 0
        if isinstance(self._program, MatrixProgram):
            assert sizes is not None
            inputs = self._program.inputs
            inside = _inside(slot.param.shape[-1], *sizes)
            given = tuple(torch.where(inside, value, 0) for value in given)
            changes = changes & inside
            values |= {symbol: size.to(wide) for symbol, size in zip((height, width), sizes, strict=True)}
        values |= dict(zip(inputs, given, strict=True))
        for run in self._statements:
            run(values)
        # All new values are computed before any is stored: one may be the old value of another tensor.
        held = (slot.param, *slot.states)
        results = []
        for number, (symbol, old) in enumerate(zip(self._program.results, held, strict=True)):
            value = values[symbol]
            if self._stochastic and number > 0 and old.dtype == torch.bfloat16:
                value = round_stochastically(value.float(), seed, step.long(), slot.order, number - 1)
            results.append(torch.where(changes, value, old))
        for tensor, value in zip(held, results, strict=True):
            tensor.copy_(value)


def round_stochastically(value: Tensor, seed: int, step: Tensor, index: int, number: int) -> Tensor:
    """Round `value` up or down to bfloat16 by the random bits that the generated kernels draw for the same element.

    Args:
        value: float32, any shape; elements are numbered in the order of memory.
        seed: the optimizer's seed, 0 to 2³² - 1.
        step: the number of the step, int64 `[]`.
        index: the parameter's index in its optimizer.
        number: the state's index in its rule.

    Returns:
        Rounded values, float32, in the shape of `value`.
    """
    key = _mix(_mix(_mix(step ^ seed) + index) + number)
    # `torch.empty_like` keeps the memory layout, which gives each element its number.
    place = torch.empty_like(value, dtype=torch.int64)
    order = torch.arange(value.numel(), device=value.device)
    place.as_strided(order.shape, (1,)).copy_(order)
    random = _mix(_mix((place & 0xFFFFFFFF) ^ key) + (place >> 32))
    bits = value.view(torch.int32).to(torch.int64)
    rounded = ((bits + (random & 0xFFFF)) & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits as the kernels do, in 64-bit integers."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _block_sizes(slot: Slot) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of each block inside its dense weight, `[nnz, 1, 1]` each; b without a weight."""
    b, target = slot.param.shape[-1], slot.target
    if target is None:
        whole = torch.full((1, 1, 1), b, device=slot.param.device)
        return whole, whole
    rows, cols = (
        (size - at * b).clamp(max=b)[:, None, None]
        for size, at in zip(target.matrix.shape, target.positions, strict=True)
    )
    return rows, cols


def _inside(b: int, rows: Tensor, cols: Tensor) -> Tensor:
    """Return whether each element `[nnz, b, b]` of the blocks lies inside the dense weight."""
    lane = torch.arange(b, device=rows.device)
    inside: Tensor = (lane[:, None] < rows) & (lane < cols)
    return inside


def _elementwise(symbol: sp.Symbol, expression: sp.Expr) -> Run:
    compute = _function(expression)

    def run(values: Values) -> None:
        values[symbol] = compute(values)

    return run


def _matrix_statement(statement: Plain, rounded: torch.dtype | None) -> Run:
    """Return the function of a statement over blocks; products round their factors to `rounded` if it is given."""
    match statement:
        case Product(target, left, right, transposed):

            def run(values: Values) -> None:
                one, other = values[left].mT if transposed else values[left], values[right]
                if rounded is not None:
                    one, other = (factor.to(rounded).to(factor.dtype) for factor in (one, other))
                values[target] = one @ other

        case Transpose(target, source):

            def run(values: Values) -> None:
                values[target] = values[source].mT

        case Sum(target, expression):
            compute = _function(expression)

            def run(values: Values) -> None:
                values[target] = compute(values).sum((-2, -1), keepdim=True)

        case _:
            return _elementwise(statement.target, statement.expression)
    return run


def _function(expression: sp.Expr) -> Any:
    """Return a function of `{symbol: tensor}` that computes `expression`."""
    code = compile(torch_expression(expression), f"<{expression}>", "eval")

    def compute(values: dict[sp.Symbol, Any]) -> Tensor:
        names = {symbol.name: values[symbol] for symbol in expression.free_symbols}
        value = eval(code, {"torch": torch}, names)
        # A constant becomes a scalar tensor on the CPU, which combines with tensors of any device.
        return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")

    return compute
