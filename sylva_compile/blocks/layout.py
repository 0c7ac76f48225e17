"""Where a weight's blocks sit, as the tensors that the compiled graph takes as inputs.

They are inputs and not constants of the graph, so that layers of one shape can share a compiled graph without ever
sharing a mask.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sylva_compile.blocks.masks import BlockMask


class BlockLayout:
    """The positions of one weight's blocks, whole and narrow.

    Attributes:
        positions: `int64[2, nnz]`, block rows and block columns.
        input_channels: `int64[k]`, elements of the weight's input axis, ascending: all that its blocks cover, and what the
            weights cover with which it shares them.
        narrow_positions: `int64[2, nnz]`, the positions once the input axis is restricted to `input_channels`.
        block_size: b.
        input_axis: the axis of the stored weight that the layer's inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
    """

    def __init__(self, mask: "BlockMask", axis: int, device: torch.device) -> None:
        """Lay out `mask` on `device`."""
        self.block_size, self.input_axis = mask.block_size, axis
        self.input_channels: Tensor
        self.narrow_positions: Tensor
        self._width = mask.shape[axis]
        self._positions = torch.stack([mask.rows, mask.cols])
        self._used = self._positions[axis].unique()
        self.positions = self._positions.to(device, copy=True)
        share_input_channels([self])

    @property
    def sizes(self) -> tuple[int, int]:
        """What of a layout the shapes of a graph depend on: the number of blocks, and of input lines."""
        return self.positions.shape[1], self.input_channels.shape[0]

    def to(self, device: torch.device) -> None:
        """Move every index tensor to `device`, in place. Lines that were shared are shared no more."""
        self.positions = self.positions.to(device)
        self.input_channels = self.input_channels.to(device)
        self.narrow_positions = self.narrow_positions.to(device)

    def let_sizes_vary(self) -> bool:
        """Ask Dynamo to compile for any number of blocks and lines; returns whether that is new."""
        marks = ((self.positions, 1), (self.narrow_positions, 1), (self.input_channels, 0))
        new = any(axis not in getattr(tensor, "_dynamo_weak_dynamic_indices", ()) for tensor, axis in marks)
        for tensor, axis in marks:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return new


def share_input_channels(layouts: Iterable[BlockLayout]) -> bool:
    """Give `layouts` one tensor of input lines, those that any of them needs; returns whether that changes anything.

    For weights that read the same activation, one narrow copy of it then serves all. Layouts whose input axes differ
    cannot share, and are left alone.
    """
    first, *others = layouts
    same = [first, *(other for other in others if _input_space(other) == _input_space(first))]
    lines = getattr(first, "input_channels", None)
    if lines is not None and all(layout.input_channels is lines for layout in same):
        return False
    used = torch.cat([layout._used for layout in same]).unique()
    b, device = first.block_size, first.positions.device
    elements = (used[:, None] * b + torch.arange(b, device="cpu")).flatten()
    shared = elements[elements < first._width].to(device)
    for layout in same:
        narrow = layout._positions.clone()
        narrow[layout.input_axis] = torch.searchsorted(used, layout._positions[layout.input_axis])
        layout.input_channels, layout.narrow_positions = shared, narrow.to(device)
    return True


def _input_space(layout: BlockLayout) -> tuple[object, ...]:
    return layout._width, layout.block_size, layout.positions.device
