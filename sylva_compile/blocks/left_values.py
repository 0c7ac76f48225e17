"""`LeftValues`: what blocks of a quantised weight have left behind, by place.

The base is never written, so a value that a block leaves has no home in it. The store keeps it on the weight's device,
in the dtype of trained values, and passes write it into the dequantised weight below the blocks. A place stays in the
store once a block has left it; where a block lies now, its value wins.
"""

import torch
from torch import Tensor

from sylva_compile._torch import maybe_mark_dynamic
from sylva_compile.kernels.blocks import grid_shape


class LeftValues:
    """The values at the places that blocks have left.

    Attributes:
        positions: `int64[2, k]` on the weight's device. Graphs read this tensor and `values`: both change in place.
        values: `[k, b, b]`.
    """

    def __init__(self, shape: tuple[int, int], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Keep nothing yet of a weight of `shape`."""
        self._slots = torch.full(grid_shape(shape, block_size), -1, dtype=torch.int64, device="cpu")
        self.positions = torch.empty((2, 0), dtype=torch.int64, device=device)
        self.values = torch.empty((0, block_size, block_size), dtype=dtype, device=device)

    @property
    def count(self) -> int:
        """The number of places."""
        return self.positions.shape[1]

    def slots(self, places: Tensor) -> Tensor:
        """Return the index among `values` of each of `places int64[2, k]`, on the CPU, or -1."""
        return self._slots[places[0], places[1]]

    @torch.no_grad()
    def put(self, places: Tensor, values: Tensor) -> None:
        """Keep `values [k, b, b]` at `places int64[2, k]`, on the CPU, in the place of what was kept there."""
        known = self.slots(places)
        device = self.values.device
        values = values.to(device, self.values.dtype)
        old, new = (known >= 0).nonzero().squeeze(1), (known < 0).nonzero().squeeze(1)
        self.values[known[old].to(device)] = values[old.to(device)]
        if len(new):
            added = places[:, new]
            self._slots[added[0], added[1]] = torch.arange(self.count, self.count + len(new), device="cpu")
            self._set(
                torch.cat([self.positions, added.to(device)], 1), torch.cat([self.values, values[new.to(device)]])
            )

    def clear(self) -> None:
        """Keep nothing any more."""
        self._slots.fill_(-1)
        self._set(self.positions[:, :0].clone(), self.values[:0].clone())

    def to(self, device: torch.device) -> None:
        """Move what graphs read to `device`."""
        self.positions, self.values = self.positions.to(device), self.values.to(device)
        self._mark()

    def _set(self, positions: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            self.positions.resize_(positions.shape).copy_(positions)
            self.values.resize_(values.shape).copy_(values)
        self._mark()

    def _mark(self) -> None:
        """Let one graph serve any number of places: each move adds some."""
        maybe_mark_dynamic(self.positions, 1)
        maybe_mark_dynamic(self.values, 0)
