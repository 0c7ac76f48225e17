"""The table of addresses from which one launch steps every parameter, whatever its shape, dtype and layout.

A row describes one parameter: the addresses and dtypes of its values, states and step count and, for blocks of a dense
weight, the address of that weight and the positions of the blocks in it. A tile is a piece of one parameter that one
thread or program steps. Addresses of gradients change from step to step and have a tensor of their own.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

COLUMNS = (
    "PARAM",
    "PARAM_TYPE",
    "GRAD_TYPE",
    "COUNT",
    "HYPER",
    "STEP",
    "BORN",
    "INDEX",
    "DENSE",
    "DENSE_TYPE",
    "ROW_STRIDE",
    "COL_STRIDE",
    "ROWS",
    "COLS",
    "BLOCK",
    "POSITIONS",
    "BLOCKS",
)
"""An address is 0 where there is no tensor: `STEP` without a step count, `BORN` where no block is younger than its
parameter, `DENSE` of an ordinary parameter. `BLOCK` is 0 if the kernel need not know the blocks."""

STATE_COLUMNS = ("STATE", "STATE_TYPE")
"""A row repeats these columns for every state."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
STOCHASTIC = 4
"""The code of a bfloat16 state that is rounded stochastically."""


Products = Literal["float32", "tf32", "bfloat16"]
"""The precision of matrix products' factors; sums are float32 or wider."""


class Target(NamedTuple):
    """The dense weight of blocks.

    Attributes:
        matrix: `[m, n]`, any strides.
        positions: `int64[2, nnz]`.
        block_size: b.
        by_address: whether a kernel can write the blocks into the matrix: all tensors lie on one device, and positions
            and blocks are contiguous.
    """

    matrix: Tensor
    positions: Tensor
    block_size: int
    by_address: bool


class Slot(NamedTuple):
    """One parameter and the tensors that its step reads and writes, without the gradient.

    Attributes:
        param: any shape; a kernel needs its elements side by side in memory.
        states: laid out as `param`, in the rule's order.
        step: float32 `[]`, the number of steps so far; None if steps are not counted.
        group: the index of its row of hyperparameters.
        order: its index among the optimizer's parameters, part of the seed of stochastic rounding.
        target: the dense weight of blocks; None for an ordinary parameter.
        born: float32 `[nnz]`, the value of `step` when the states of each block of `param`, contiguous `[nnz, b, b]`,
            started from zero: a rule's `t` is the step's number minus `born`. None if all started with the first step.
    """

    param: Tensor
    states: tuple[Tensor, ...]
    step: Tensor | None
    group: int
    order: int
    target: Target | None
    born: Tensor | None = None


class StepTable:
    """The rows and tiles of one launch, on its device. They are copied there again only when one of them changes."""

    def __init__(
        self, device: torch.device, tile: int, *, whole_blocks: bool, stochastic: bool, over_blocks: bool = False
    ) -> None:
        """An empty table.

        Args:
            device: the device of every tensor that the rows name.
            tile: elements a tile.
            whole_blocks: end the tiles of blocks where a block ends, even if such a tile has more or fewer elements.
            stochastic: round bfloat16 states stochastically.
            over_blocks: every parameter is blocks `[n, b, b]`, even without a dense weight.
        """
        self.device, self.tile = device, tile
        self._whole_blocks, self._stochastic, self._over_blocks = whole_blocks, stochastic, over_blocks
        self._rows: list[tuple[int, ...]] = []
        self._addresses: list[int] = []
        self.rebuilt = 0
        """The number of times that the rows were copied to the device."""
        self.has_ages = False
        """Whether a row has the blocks' own step counts."""
        self.rows = self.tiles = self.gradients = torch.empty(0, dtype=torch.int64, device=device)

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Describe this step. Gradients are laid out as their parameters; a parameter without one is not stepped."""
        rows = [self._row(slot, gradient) for slot, gradient in zip(slots, gradients, strict=True)]
        if rows != self._rows:
            self._rows = rows
            self.has_ages = any(row[COLUMNS.index("BORN")] for row in rows)
            self.rows = self._send(rows)
            self.tiles = self._tiles(rows).to(self.device)
            self.rebuilt += 1
        # An empty gradient has no address, but the step of its parameter must be counted.
        addresses = [0 if gradient is None else gradient.data_ptr() or 1 for gradient in gradients]
        if addresses != self._addresses:
            self._addresses = addresses
            self.gradients = self._send(addresses)

    @property
    def largest_block(self) -> int:
        """The size of the largest block in the table, at least 1."""
        return max((1, *(row[COLUMNS.index("BLOCK")] for row in self._rows)))

    def _row(self, slot: Slot, gradient: Tensor | None) -> tuple[int, ...]:
        param, target = slot.param, slot.target
        is_blocks = self._over_blocks or slot.born is not None
        # The table's columns from DENSE to BLOCKS.
        dense: tuple[int, ...] = (0, 0, 0, 0, 0, 0, param.shape[-1] if is_blocks else 0, 0, 0)
        if target is not None:
            matrix, positions = target.matrix, target.positions
            dense = (
                matrix.data_ptr(),
                TYPES[matrix.dtype],
                *matrix.stride(),
                *matrix.shape,
                target.block_size,
                positions.data_ptr(),
                positions.shape[1],
            )
        row = (
            param.data_ptr(),
            TYPES[param.dtype],
            TYPES[param.dtype if gradient is None else gradient.dtype],
            param.numel(),
            slot.group,
            0 if slot.step is None else slot.step.data_ptr(),
            0 if slot.born is None else slot.born.data_ptr(),
            slot.order,
            *dense,
        )
        for state in slot.states:
            rounded = self._stochastic and state.dtype == torch.bfloat16
            row += (state.data_ptr(), STOCHASTIC if rounded else TYPES[state.dtype])
        return row

    def _send(self, values: Sequence[int] | Sequence[tuple[int, ...]]) -> Tensor:
        return send(torch.tensor(values, dtype=torch.int64, device="cpu"), self.device)

    def _tiles(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return `int64[tiles, 2]`: the row and the first element of each tile."""
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        block, count = table[:, COLUMNS.index("BLOCK")], table[:, COLUMNS.index("COUNT")]
        size = torch.full_like(count, self.tile)
        if self._whole_blocks:
            area = (block * block).clamp(min=1)
            size = torch.where(block > 0, (self.tile // area).clamp(min=1) * area, size)
        number = (count + size - 1) // size
        row = torch.arange(len(rows), device="cpu").repeat_interleave(number)
        before = number.cumsum(0) - number
        return torch.stack([row, (torch.arange(len(row), device="cpu") - before[row]) * size[row]], dim=1)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy `values` from the CPU to `device` without waiting for it."""
    if device.type != "cuda":
        return values
    # torch keeps pinned memory until the copy out of it has run, so the next step may pin another.
    return values.pin_memory().to(device, non_blocking=True)


class Launch(Protocol):
    """The step of one rule for the parameters of one device."""

    device: torch.device
    writes_by_address: bool
    """Whether the step writes blocks into their targets too, and writes every tensor without autograd's knowledge."""

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Set the parameters and gradients of this step. Gradients are laid out as their parameters, or None."""

    def squares(self) -> Tensor:
        """Return `float64[pieces]`, sums of squares of pieces of the gradients; not finite where an element is not."""

    def step(self, hyper: Tensor, scale: Tensor, skip: Tensor, seed: int) -> None:
        """Step every parameter that has a gradient, and count its step.

        Args:
            hyper: `float64[groups, hyperparameters]`, on the device, as `scale` and `skip`.
            scale: float64 `[]`, the factor of every gradient.
            skip: float64 `[]`; a value other than zero leaves everything unchanged.
            seed: the seed of stochastic rounding, 0 to 2³² - 1.
        """
