"""`BlockLayout`: the index tensors of one weight's blocks, which compiled graphs take as inputs.

They are inputs and not constants of the graph, so that layers of one shape share a compiled graph although each has a
mask of its own, and so that blocks can move while graphs stay. A move writes into the tensors in place. Only the number
of input channels could change then; `reserve` fixes it beforehand, and unused channels fill up the list.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sylva_compile._torch import axes_marked_dynamic, maybe_mark_dynamic
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.kernels.blocks import grid_shape


class BlockLayout:
    """The positions of one weight's blocks in the weight, and in the input channels that the blocks read.

    Attributes:
        positions: `int64[2, nnz]`, block rows and block columns. Kernels, the optimizer and compiled graphs all read
            this tensor.
        input_channels: `int64[k]`, ascending: the channels of the layer's input that the blocks of this weight read, or
            the union of these channels for all weights that share this tensor; and others, where more are reserved.
        narrow_positions: `int64[2, nnz]`, the positions once the input axis is restricted to `input_channels`.
        block_size: b.
        input_axis: the axis of the stored weight that the layer's inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
        experts: E of a weight `[E, m, n]`, 1 otherwise. Its experts read the same inputs, each its own tokens. So for
            an input axis of 0, the input channels are those of one expert, read by the blocks of any.
        gate: bool `[]` on the CPU, which weights may share: where it is false, backward passes compute no gradient of
            the blocks and give zeros. None: the blocks always get their gradient.
        others: the masks of other adapters that may take this one's place, by name. Room is kept for the input channels
            of each, so that their number is the same for all.
        scores: float32 over the grid of blocks. While it is there, backward passes add every block's squared norm of
            the weight gradient to `scores.grad`.
        sketch: whether a compiled graph may put a cheap estimate in place of that norm.
    """

    def __init__(self, mask: BlockMask, axis: int, device: torch.device, experts: int = 1) -> None:
        """Lay out `mask` on `device`; `axis` is the input axis of the stored weight, of which each expert has one."""
        self.block_size, self.input_axis, self.experts = mask.block_size, axis, experts
        self.input_channels: Tensor
        self.narrow_positions: Tensor
        stacked, grid = experts if axis == 0 else 1, grid_shape(mask.shape, mask.block_size)
        self._width, self._across = mask.shape[axis] // stacked, grid[axis] // stacked
        self._mask, self._reserved = mask, 0
        self.others: dict[str, BlockMask] = {}
        self.gate: Tensor | None = None
        self.scores: Tensor | None = None
        self.sketch = False
        # A copy even on the CPU: compiled graphs and look-ups know a weight by the identity of this tensor.
        self.positions = mask.positions.to(device, copy=True)
        share_input_channels([self])

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but what a schedule of this model has set: a copy of the model has none."""
        return self.__dict__ | {"gate": None, "scores": None}

    @property
    def width(self) -> int:
        """The number of channels of the layer's input."""
        return self._width

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of blocks and the number of input channels, on which the shapes of a graph depend."""
        return self.positions.shape[1], self.input_channels.shape[0]

    def to(self, device: torch.device) -> None:
        """Move every index tensor to `device`. Layouts that shared their input channels have a copy each afterwards."""
        self.positions = self.positions.to(device)
        self.input_channels = self.input_channels.to(device)
        self.narrow_positions = self.narrow_positions.to(device)
        self.scores = None if self.scores is None else self.scores.detach().to(device).requires_grad_(True)

    def move(self, mask: BlockMask) -> None:
        """Follow the blocks to the places of `mask`, in place; `update_input_channels` does the rest."""
        self._mask = mask
        self.positions.copy_(mask.positions)

    def reserve(self, columns: int) -> None:
        """Keep room for `columns` block columns, so that moves within them leave the number of channels as it is.

        It takes effect with the next `update_input_channels`.
        """
        # Where b does not divide the width, the last column has fewer channels. It is always in the list then.
        self._reserved = min(columns + (self._width % self.block_size > 0), self._across)

    def listen(self, sketch: bool) -> None:
        """Let backward passes score all blocks from now on, from zero."""
        self.sketch = sketch
        grid = grid_shape(self._mask.shape, self.block_size)
        self.scores = torch.zeros(grid, dtype=torch.float32, device=self.positions.device, requires_grad=True)

    def heard(self) -> Tensor | None:
        """Return the scores since `listen`, on the CPU, and listen no more; None where no backward pass scored."""
        scores, self.scores = None if self.scores is None else self.scores.grad, None
        return None if scores is None else scores.cpu()

    def mark_sizes_dynamic(self) -> bool:
        """Ask Dynamo to compile for any number of blocks and input channels; return whether that is new."""
        marks = ((self.positions, 1), (self.narrow_positions, 1), (self.input_channels, 0))
        new = any(axis not in axes_marked_dynamic(tensor) for tensor, axis in marks)
        for tensor, axis in marks:
            maybe_mark_dynamic(tensor, axis)
        return new


def share_input_channels(layouts: Iterable[BlockLayout]) -> bool:
    """Give `layouts` one tensor of input channels, the union of all; return whether that changes anything.

    Weights that read the same activation then need one narrow copy of it. Layouts whose input axis has another size,
    block size or device than the first layout's are left alone.
    """
    first, *others = layouts
    same = [first, *(other for other in others if _input_space(other) == _input_space(first))]
    current = getattr(first, "input_channels", None)
    if current is not None and all(layout.input_channels is current for layout in same):
        return False
    columns = _columns(same)
    channels = _channels(columns, first).to(first.positions.device)
    for layout in same:
        layout.input_channels = channels
        layout.narrow_positions = _narrow(columns, layout).to(channels.device)
    return True


def update_input_channels(layouts: Iterable[BlockLayout]) -> None:
    """Follow the moves of `layouts`, in place; layouts that share one tensor of input channels all are among them."""
    groups: dict[int, list[BlockLayout]] = {}
    for layout in layouts:
        groups.setdefault(id(layout.input_channels), []).append(layout)
    for group in groups.values():
        columns = _columns(group)
        channels = _channels(columns, group[0])
        # One tensor for good: all layouts hold it, with the marks that Dynamo has read from it.
        group[0].input_channels.resize_(channels.shape).copy_(channels)
        for layout in group:
            layout.narrow_positions.copy_(_narrow(columns, layout))


def _columns(layouts: Sequence[BlockLayout]) -> Tensor:
    """Return the block columns of the input that the blocks of `layouts` read, and others up to the number reserved."""
    ragged = layouts[0]._width % layouts[0].block_size > 0
    taken = _read_by((layout, layout._mask) for layout in layouts)
    wanted = max(layout._reserved for layout in layouts)
    for name in {name for layout in layouts for name in layout.others}:
        other = _read_by((layout, layout.others[name]) for layout in layouts if name in layout.others)
        other[-1] |= ragged
        wanted = max(wanted, int(other.sum()))
    if wanted:
        # The last column first; see `reserve`.
        taken[-1] |= ragged
        free = (~taken).nonzero().squeeze(1)
        taken[free[: max(wanted - int(taken.sum()), 0)]] = True
    return taken.nonzero().squeeze(1)


def _read_by(masks: Iterable[tuple[BlockLayout, BlockMask]]) -> Tensor:
    """Return the block columns of the input that masks of these layouts read: bool over all columns."""
    pairs = list(masks)
    taken = torch.zeros(pairs[0][0]._across, dtype=torch.bool, device="cpu")
    for layout, mask in pairs:
        taken[mask.positions[layout.input_axis] % layout._across] = True
    return taken


def _channels(columns: Tensor, layout: BlockLayout) -> Tensor:
    """Return the input channels of block `columns`."""
    b = layout.block_size
    channels = (columns[:, None] * b + torch.arange(b, device="cpu")).flatten()
    return channels[channels < layout._width]


def _narrow(columns: Tensor, layout: BlockLayout) -> Tensor:
    """Return the positions of the layout's blocks once its input axis is restricted to block `columns`."""
    narrow, axis = layout._mask.positions.clone(), layout.input_axis
    # Stacked experts that are stored transposed have rows of blocks of their own: as many as `columns`, each.
    expert, column = narrow[axis] // layout._across, narrow[axis] % layout._across
    narrow[axis] = expert * len(columns) + torch.searchsorted(columns, column)
    return narrow


def _input_space(layout: BlockLayout) -> tuple[object, ...]:
    return layout._width, layout.block_size, layout.positions.device
