"""`SyncedBlocks`: the rule that keeps the blocks and the dense weight of a state one value.

The rule: the blocks of the dense weight always equal the `<name>_blocks` parameter, rounded to the weight's dtype. The
`<name>_blocks` parameter holds the master values.

| what changed since both were equal          | what happens                                                         |
| ------------------------------------------- | -------------------------------------------------------------------- |
| the blocks (an optimizer, an edit in place) | they are written into the dense weight                               |
| the dense weight, in place                  | the blocks are read from it; an edit elsewhere makes the base unknown |
| both                                        | the blocks win: they hold more bits                                  |
| the dense weight, by loading or assigning   | the blocks are read; a weight that differs outside is a new base     |

`sync` applies the first three rows. It runs before anything reads either tensor: forward passes, steps, moves, copies,
state dicts. `BlockState.follow_assignment` applies the last row, when the module's weight is loaded or assigned.

The rule rests while `disable_adapter` shows the base (`base_values`): the dense weight holds the values from before
training then, the blocks keep theirs, and whatever would write one into the other raises an error.

A weight that `fully_shard` has split has a home, its shards, and is alive, gathered, during passes. The rule holds for
both. What is alive is whole on every process, so that a pass needs no message to follow an edit, unless a
MixedPrecisionPolicy has gathered it in another dtype.
"""

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.known_base import KnownBase
from sylva_compile.blocks.layout import BlockLayout
from sylva_compile.blocks.places import zero_outside
from sylva_compile.blocks.shards import ShardWriter, is_sharded, put, read_places, whole
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.blocks import BlockWriter


class SyncedBlocks(KnownBase):
    """A dense weight and its blocks; the attributes are described in `BlockState`."""

    mask: BlockMask
    blocks: nn.Parameter
    live_weight: nn.Parameter
    live_blocks: nn.Parameter
    layout: BlockLayout
    writer: BlockWriter | ShardWriter
    disabled: int
    _versions: tuple[int, int]
    _gathered: int = -1
    """Autograd's count of writes into `blocks` at which `live_blocks` was equal to them."""

    @property
    def split(self) -> nn.Parameter | None:
        """The weight or else the blocks, if processes hold parts of them; `fully_shard` may ignore one of the two."""
        return next((tensor for tensor in (self.weight, self.blocks) if is_sharded(tensor)), None)

    @property
    def is_wide(self) -> bool:
        """Whether the blocks have a dtype that keeps small steps."""
        return self.blocks.dtype in (torch.float32, torch.float64)

    def check_wide(self) -> None:
        """Raise EmbedError where somebody has made the blocks narrow by an assignment to their `.data`."""
        if not self.is_wide:
            raise EmbedError(
                f"The blocks of {self.name} were made {self.blocks.dtype} by an assignment to `.data`, and would lose "
                "small steps; convert models by model.to(...), and give TRL's trainers BlocksTrainerMixin."
            )

    def sync(self) -> None:
        """Make blocks and dense weight equal again after an edit in place that autograd has counted."""
        weight_version, blocks_version = self._versions
        if self.disabled and self._versions != (self.weight._version, self.blocks._version):
            self.check_enabled()
        edited = self.weight._version != weight_version
        if edited:
            self.doubt_base()
        if self.blocks._version != blocks_version:
            self.push()
        elif edited:
            self.pull()

    def pull(self) -> None:
        """Read the blocks from the dense weight. Blocks that still round to the dense value keep their low bits."""
        with torch.no_grad():
            dense, blocks = self._dense_blocks(), self.whole_blocks()
            unchanged = blocks.to(dense.dtype) == dense
            self.put_blocks(torch.where(unchanged, blocks, dense.to(blocks.dtype)))
        self.mark_synced()

    def push(self) -> None:
        """Write the blocks, rounded, into the dense weight."""
        self.push_values(self.whole_blocks())

    def push_values(self, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]`, the values of the blocks, into the dense weight."""
        self.check_enabled()
        self.writer.write(self.weight, blocks)
        if self.live_weight is not self.weight:
            BlockWriter(self.mask.shape, self.layout.positions, self.mask.block_size).write(self.live_weight, blocks)
        self.mark_synced()

    def whole_blocks(self) -> Tensor:
        """Return the values of all blocks, `[nnz, b, b]`; processes that hold parts of them all call this."""
        gathered = self.live_blocks is not self.blocks and self.live_blocks.dtype == self.blocks.dtype
        # After an evaluation blocks stay gathered, and an optimizer or an edit changes the shards alone.
        current = gathered and self._gathered == self.blocks._version
        return self.live_blocks.detach() if current else whole(self.blocks)

    def mark_gathered(self) -> None:
        """Record that `live_blocks` are equal to the blocks now."""
        self._gathered = self.blocks._version

    def follow_home(self) -> None:
        """Let a dense weight that `fully_shard` still holds gathered, after an evaluation, be what its shards are."""
        if self.live_weight is not self.weight:
            with torch.no_grad():
                self.live_weight.copy_(whole(self.weight))

    def mark_synced(self) -> None:
        """Record that weight and blocks are equal now; a kernel that wrote both by address calls this."""
        self._versions = (self.weight._version, self.blocks._version)

    def mark_weight_written(self) -> None:
        """Record that the dense weight is as it should be; an edit of the blocks that nobody has followed stays one."""
        self._versions = (self.weight._version, self._versions[1])

    def is_synced(self) -> bool:
        """Whether the dense weight's blocks equal the rounded blocks; compares all values and waits for the device."""
        dense = self._dense_blocks()
        rounded = self.zero_outside(self.whole_blocks().to(dense.dtype))
        # NaN has many bit patterns, and rounding may change one into another.
        return bool(((dense == rounded) | (dense.isnan() & rounded.isnan())).all())

    def check_synced(self) -> None:
        """Raise EmbedError unless blocks and dense weight are equal; a weight on the meta device has no values."""
        if self.weight.device.type != "meta" and not self.is_synced():
            raise EmbedError(
                f"{self.name}: blocks and dense weight differ, so something wrote past autograd (`.data`, a raw "
                "pointer); call masks.write_through() to keep the blocks, or change the weight under torch.no_grad()."
            )

    def check_enabled(self) -> None:
        """Raise EmbedError while `disable_adapter` shows the base."""
        if self.disabled:
            raise EmbedError(
                f"{self.name} shows its base inside of disable_adapter, where nothing is trained, moved, copied, saved "
                "or loaded; leave the block first."
            )

    def zero_outside(self, blocks: Tensor) -> Tensor:
        """Return `blocks [nnz, b, b]` with zeros where a block crosses the weight's edge."""
        return zero_outside(blocks, self.layout.positions, self.mask.shape)

    def _dense_blocks(self, positions: Tensor | None = None) -> Tensor:
        weight = self.live_weight if self.live_weight.dtype == self.weight.dtype else self.weight
        return read_places(weight, self.layout.positions if positions is None else positions, self.mask.block_size)

    def put_blocks(self, values: Tensor) -> None:
        """Copy `values [nnz, b, b]` into the blocks; the dense weight is left as it is."""
        put(self.blocks, values)
        if self.live_blocks is not self.blocks:
            self.live_blocks.copy_(values)
            self.mark_gathered()
