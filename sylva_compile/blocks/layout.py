"""`BlockLayout`: the index tensors of one weight's blocks, which compiled graphs take as inputs.

They are inputs and not constants of the graph, so that layers of one shape share a compiled graph although each has a
mask of its own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from sylva_compile._torch import axes_marked_dynamic, maybe_mark_dynamic
from sylva_compile.blocks.block_mask import BlockMask


class BlockLayout:
    """The positions of one weight's blocks in the weight, and in the input channels that the blocks read.

    Attributes:
        positions: `int64[2, nnz]`, block rows and block columns. Kernels, the optimizer and compiled graphs all read
            this tensor.
        input_channels: `int64[k]`, ascending: the channels of the layer's input that the blocks of this weight read, or
            the union of these channels for all weights that share this tensor.
        narrow_positions: `int64[2, nnz]`, the positions once the input axis is restricted to `input_channels`.
        block_size: b.
        input_axis: the axis of the stored weight that the layer's inputs meet: 1 for `nn.Linear`, 0 for Conv1D.
    """

    def __init__(self, mask: BlockMask, axis: int, device: torch.device) -> None:
        """Lay out `mask` on `device`; `axis` is the input axis of the stored weight."""
        self.block_size, self.input_axis = mask.block_size, axis
        self.input_channels: Tensor
        self.narrow_positions: Tensor
        self._width = mask.shape[axis]
        # A copy even on the CPU: compiled graphs and look-ups know a weight by the identity of this tensor.
        self.positions = mask.positions.to(device, copy=True)
        share_input_channels([self])

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of blocks and the number of input channels, on which the shapes of a graph depend."""
        return self.positions.shape[1], self.input_channels.shape[0]

    def to(self, device: torch.device) -> None:
        """Move every index tensor to `device`. Layouts that shared their input channels have a copy each afterwards."""
        self.positions = self.positions.to(device)
        self.input_channels = self.input_channels.to(device)
        self.narrow_positions = self.narrow_positions.to(device)

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
    used = torch.cat([layout.positions[layout.input_axis] for layout in same]).unique()
    b, device = first.block_size, first.positions.device
    channels = (used[:, None] * b + torch.arange(b, device=device)).flatten()
    shared = channels[channels < first._width]
    for layout in same:
        narrow = layout.positions.clone()
        narrow[layout.input_axis] = torch.searchsorted(used, layout.positions[layout.input_axis])
        layout.input_channels, layout.narrow_positions = shared, narrow
    return True


def _input_space(layout: BlockLayout) -> tuple[object, ...]:
    return layout._width, layout.block_size, layout.positions.device
