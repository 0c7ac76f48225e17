"""`QuantisedState`: the blocks of a quantised weight, and what they have left behind.

The weight that a layer computes with is made in each pass: the base, dequantised, with what blocks have left behind and
the blocks written into it. The base is never written. So there is nothing to keep equal, `unload_adapter` is free, and
a state dict of the model holds the blocks: nothing else does.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState, new_base_id
from sylva_compile.blocks.layout import BlockLayout
from sylva_compile.blocks.left_values import LeftValues
from sylva_compile.blocks.places import round_stochastically, where
from sylva_compile.blocks.quantised_base import checksum_of_base
from sylva_compile.blocks.quantised_originals import QuantisedOriginals
from sylva_compile.embedded.wide import stay_wide
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.blocks import block_dtype, grid_shape, read_blocks
from sylva_compile.kernels.step.table import Target
from sylva_compile.quantised.format import QuantisedBase
from sylva_compile.quantised.overwrite import overwrite, overwrite_


class QuantisedState(BlockState):
    """The state of one quantised weight.

    Attributes:
        format: of the weight.
        value_dtype: the dtype that trained values are rounded to in passes.
        left: what blocks have left behind.
    """

    is_quantised = True

    def __init__(
        self, name: str, weight: nn.Parameter, mask: BlockMask, base: QuantisedBase, masks_config: dict[str, Any]
    ) -> None:
        """Read the blocks of `base` at `mask`."""
        self.name, self.mask, self.weight, self.format = name, mask, weight, base.format
        self.masks_config, self.was_trainable = dict(masks_config), weight.requires_grad
        self.value_dtype = base.value_dtype
        self.layout = BlockLayout(mask, 1, weight.device)
        self.left = LeftValues(mask.shape, mask.block_size, self.value_dtype, weight.device)
        self.base_known, self.base_id = True, new_base_id()
        self.moves = self.disabled = 0
        self.had_gradient = False
        self.stepped_by = weakref.WeakSet()
        self._owners = []
        values = read_blocks(base.dense(), self.layout.positions, mask.block_size)
        self.blocks = nn.Parameter(values.to(block_dtype(self.value_dtype)).contiguous())
        self.live_weight, self.live_blocks = weight, self.blocks
        self.earlier_blocks = None
        self.mark_synced()

    @property
    def base(self) -> QuantisedBase:
        """The base, in the first module that holds it."""
        module, _ = next(self.owners())
        return QuantisedBase(module, self.format)

    @property
    def originals(self) -> QuantisedOriginals:  # type: ignore[override]
        """The values from before training, read from the base when they are asked for."""
        return QuantisedOriginals(self.base, self.trained_places(), self.mask.block_size)

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """The blocks: a compiled graph may take the packed weight as several other tensors."""
        return (self.live_blocks,)

    def trained_places(self) -> Tensor:
        """Return every place where blocks have been: `int64[2, k]` on the CPU, sorted by row, then column."""
        chosen = self.mask.block_map()
        left = self.left.positions.cpu()
        chosen[left[0], left[1]] = True
        return chosen.nonzero().t()

    # What keeps a dense weight and its blocks equal has nothing to do here.

    def sync(self) -> None:
        """Raise EmbedError if the blocks were edited while they show the base; else nothing can differ."""
        if self.disabled and self.blocks._version != self.disabled:
            self.check_enabled()

    def pull(self) -> None:
        """Do nothing: the base does not know the blocks."""

    def push_values(self, blocks: Tensor) -> None:
        """Write nothing: passes read the blocks themselves."""
        self.check_enabled()
        self.mark_synced()

    def is_synced(self) -> bool:
        """Return True: there are no values twice."""
        return True

    def check_base_known(self) -> None:
        """Do nothing: the base is never written."""

    def follow_assignment(self, old: Tensor) -> None:
        """Refuse: a packed weight cannot be assigned."""
        raise EmbedError(f"{self.name} is quantised and carries blocks; unload the adapter before its base changes.")

    def follow_move(self, weight: nn.Parameter, blocks: nn.Parameter, masters: Tensor) -> None:
        """Follow the module's tensors to another device; blocks keep their dtype, and `masters` are their values."""
        self.weight, self.blocks = self.live_weight, self.live_blocks = weight, blocks
        stay_wide(blocks, masters, masters.dtype)
        if weight.device.type != "meta":
            self.layout.to(weight.device)
            self.left.to(weight.device)

    def step_target(self) -> Target | None:
        """Return None: an optimizer writes the blocks alone."""
        return None

    # The weight in passes.

    def base_in_pass(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return the base of `module`, `[m, n]` in `dtype`, with what blocks have left behind; compilers trace it."""
        dense = self.format.dequantise(module).detach().to(dtype)
        # One graph without and one with it: where nothing was left, nothing is read.
        if not self.left.count:
            return dense
        return overwrite(dense, self.left.values, self.left.positions, self.mask.block_size)

    @torch.no_grad()
    def weight_in_pass(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """Return the weight that an uncompiled pass computes with, `[m, n]` in `dtype`."""
        dense = self.format.dequantise(module).to(dtype)
        for values, positions in ((self.left.values, self.left.positions), (self.blocks, self.layout.positions)):
            if positions.shape[1]:
                overwrite_(dense, values.detach(), positions)
        return dense

    def trained_dense(self) -> Tensor:
        """Return the trained weight, `[m, n]`, in the dtype that the base had before it was quantised."""
        base = self.base
        return self.weight_in_pass(base.module, self.value_dtype).to(base.format.dtype(base.weight))

    # Adapters.

    @property
    def kind(self) -> str:
        """The format and its settings."""
        return self.base.kind

    def base_checksum(self) -> str:
        """Return the checksum of the packed tensors."""
        return checksum_of_base(self.base)

        """Return the checksum of the packed tensors, which training never writes."""
        return self.base_checksum()

    def base_weight(self) -> Tensor:
        """Return the base, dequantised, `[m, n]`."""
        return self.base.dense()

    def values_at(self, places: Tensor) -> Tensor:
        """Return the trained values at `places int64[2, k]`: `[k, b, b]` in the dtype of trained values."""
        dense = self.weight_in_pass(self.base.module, self.value_dtype)
        return read_blocks(dense, places.to(dense.device), self.mask.block_size)

    def left_behind(self) -> tuple[Tensor, Tensor]:
        """Return the places where blocks have been and are no more, and the values there, on the CPU."""
        places = self.trained_places()
        left = places[:, where(self.mask.positions, places, self._grid) < 0]
        return left, self.left.values.cpu()[self.left.slots(left)]

    def saved_left(self) -> dict[str, Tensor]:
        """Return what blocks have left behind, for states of schedules, on the CPU."""
        places, values = self.left_behind()
        return {"left_places": places.to(torch.int32), "left": values}

    # Moves.

    def move(self, mask: BlockMask, generator: torch.Generator | None = None) -> Tensor:
        """Put the blocks at the places of `mask`, as `BlockState.move`; what they leave is kept in `left`, rounded."""
        before = where(self.mask.positions, mask.positions, self._grid)
        leave = torch.ones(self.mask.nnz, dtype=torch.bool, device="cpu").index_fill_(0, before[before >= 0], False)
        values = self.whole_blocks()
        leaving = values[leave.to(values.device)]
        if generator is not None and self.value_dtype == torch.bfloat16:
            leaving = round_stochastically(leaving, generator)
        self.left.put(self.mask.positions[:, leave], leaving)
        stay = (before >= 0).to(values.device)
        # Read before the blocks move: at places that no block holds, that is the base and what was left there.
        arrived = self.values_at(mask.positions).to(values.dtype)
        self._go_to(mask)
        with torch.no_grad():
            arrived[stay] = values[before[before >= 0].to(values.device)]
            self.put_blocks(arrived)
        return before

    def take_trained(self, blocks: Tensor, left: Tensor, values: Tensor | None, mask: BlockMask | None = None) -> None:
        """Take the values of another training of this base; see `BlockState.take_trained`."""
        self.check_enabled()
        if mask is not None:
            self._go_to(mask)
        self._take_left(left, values)
        with torch.no_grad():
            self.put_blocks(blocks)

    def resume(
        self,
        mask: BlockMask,
        blocks: Tensor,
        places: Tensor,
        originals: Tensor,
        left: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Go on with a training that was interrupted; see `BlockState.resume`. `left` is what `saved_left` returned."""
        if left is None:
            raise EmbedError(
                f"{self.name} is quantised here and was not in the training of this state; load that base."
            )
        self._go_to(mask)
        self._take_left(*left)
        with torch.no_grad():
            self.put_blocks(blocks)

    def _take_left(self, places: Tensor, values: Tensor | None) -> None:
        self.left.clear()
        if values is not None and places.shape[1]:
            self.left.put(places.to("cpu", torch.int64), values)

    def _go_to(self, mask: BlockMask) -> None:
        self.mask = mask
        self.layout.move(mask)
        self.moves += 1

    @property
    def _grid(self) -> tuple[int, int]:
        return grid_shape(self.mask.shape, self.mask.block_size)
