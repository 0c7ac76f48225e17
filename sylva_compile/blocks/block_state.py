"""`BlockState`: the state of one embedded weight, and how it follows loads, moves and other adapters."""

import secrets
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.blocks.base_warnings import warn_of_another_base, warn_of_whole
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.layout import BlockLayout
from sylva_compile.blocks.originals import Originals
from sylva_compile.blocks.places import round_stochastically, where
from sylva_compile.blocks.shards import copier_of, equal_everywhere, is_sharded, local, read_places, rows_of, writer_of
from sylva_compile.blocks.synced_blocks import SyncedBlocks
from sylva_compile.embedded.wide import stay_wide
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.blocks import as_matrix, block_dtype, grid_shape
from sylva_compile.kernels.step.table import TYPES, Target


def new_base_id() -> int:
    """Return a number, not 0, that no other base has; a pickled model brings its numbers into another process."""
    return 1 + secrets.randbits(64)


class BlockState(SyncedBlocks):
    """The state of one embedded weight: its dense Parameter, its blocks, and what is needed to undo the embedding.

    Attributes:
        name: the weight's name in the masks.
        mask: the blocks, where they are now.
        weight: the dense Parameter `[m, n]`, or `[E, m, n]` of E experts, frozen.
        blocks: the trainable Parameter `[nnz, b, b]`, float32 or wider.
        live_weight, live_blocks: what passes read: the whole tensors while `fully_shard` has gathered them, and
            `weight` and `blocks` at all other times.
        layout: index tensors on the weight's device.
        writer: writes blocks at the mask's positions into a dense weight.
        originals: the values from before training of every place where blocks have been.
        moves: the number of times that blocks have moved, or another adapter has taken their place.
        base_id: a number of the base; another weight, and another base of this one, has another.
        disabled: while the dense weight shows its base, a number that no other such time has; 0 otherwise.
        was_trainable: `requires_grad` of the dense weight before it was embedded.
        had_gradient: whether the blocks had a gradient when the optimizer's step began.
        stepped_by: the optimizers that have stepped the blocks, as long as they live.
        earlier_blocks: the blocks that `fully_shard` has replaced, as long as an optimizer holds them.
        masks_config: `Masks.config` of the masks that the weight was embedded with.
    """

    is_quantised = False

    def __init__(
        self, name: str, weight: nn.Parameter, mask: BlockMask, axis: int, masks_config: dict[str, Any] | None = None
    ) -> None:
        """Read the blocks of `weight [m, n]` at `mask`; `weight` itself is left as it is."""
        self.name, self.mask, self.weight = name, mask, weight
        self.masks_config = dict(masks_config or {})
        self.was_trainable = weight.requires_grad
        self.layout = BlockLayout(mask, axis, weight.device, experts=weight.shape[0] if weight.dim() == 3 else 1)
        self.writer = writer_of(weight, self.layout.positions, mask.block_size)
        values = read_places(weight, self.layout.positions, mask.block_size)
        self.originals = Originals(weight, mask.positions, mask.block_size)
        self.mark_base()
        self.base_id = new_base_id()
        self.moves = self.disabled = 0
        self.had_gradient = False
        self.stepped_by: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._owners: list[tuple[weakref.ref[nn.Module], str]] = []
        self.blocks = nn.Parameter(values.to(block_dtype(weight.dtype)).contiguous())
        self.live_weight, self.live_blocks = weight, self.blocks
        self.earlier_blocks: weakref.ref[nn.Parameter] | None = None
        self.mark_synced()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the owners and the optimizers: a copy of the model has others."""
        self.check_enabled()
        kept = {name: value for name, value in self.__dict__.items() if name != "stepped_by"}
        return kept | {"_owners": [], "earlier_blocks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, stepped_by=weakref.WeakSet())
        self.mark_synced()

    def add_owner(self, module: nn.Module, attribute: str) -> None:
        """Note that `module` holds the weight as `attribute`."""
        self._owners.append((weakref.ref(module), attribute))

    def owners(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield the modules that hold the weight, each with the attribute."""
        for ref, attribute in self._owners:
            if (module := ref()) is not None:
                yield module, attribute

    def check_not_earlier(self, stepped: set[int]) -> None:
        """Raise EmbedError if an optimizer steps, by `id`, the blocks that `fully_shard` has replaced."""
        earlier = None if self.earlier_blocks is None else self.earlier_blocks()
        if earlier is None:
            self.earlier_blocks = None
        elif id(earlier) in stepped:
            raise EmbedError(
                f"The optimizer holds the blocks of {self.name} from before fully_shard, and would train nothing; make "
                "it after fully_shard, from masks.parameters()."
            )

    def follow_assignment(self, old: Tensor) -> None:
        """Follow a dense weight that was loaded or assigned; `old [m, n]` is a copy of the values before.

        A weight that differs where no block has ever been is another base: `unload_adapter` restores its values from
        now on. A weight that is equal there resumes a training of this base.
        """
        new = self.weight.detach().clone()
        for values in (new, old):
            self.originals.fill(values, 0.0)
        if self.originals.is_whole and self.base_known:
            warn_of_whole(self.name)
        if not equal_everywhere(new, old) or not self.base_known:
            warn_of_another_base()
            self.originals = Originals(self.weight, self.mask.positions, self.mask.block_size)
            self.base_id = new_base_id()
            self.mark_base()
        self.follow_conversion()
        self.pull()

    def follow_move(self, weight: nn.Parameter, blocks: nn.Parameter, masters: Tensor) -> None:
        """Follow the module's tensors to another device or dtype; `masters` are the blocks before the move."""
        self.weight, self.blocks = self.live_weight, self.live_blocks = weight, blocks
        stay_wide(blocks, masters, block_dtype(weight.dtype))
        if weight.device.type != "meta":
            self.layout.to(weight.device)
            self.writer = writer_of(weight, self.layout.positions, self.mask.block_size)
            self.push()
        self.follow_conversion()

    def move(self, mask: BlockMask, generator: torch.Generator | None = None) -> Tensor:
        """Put the blocks at the places of `mask`, as many as before, in place.

        Blocks that stay keep their float32 values. Those of a place that blocks leave stay in the dense weight, rounded
        to its dtype. Blocks that arrive are read from the dense weight.

        Args:
            mask: the new places.
            generator: of the CPU; rounds the values of a bfloat16 weight stochastically. None rounds to nearest.

        Returns:
            The index that each block had before, or -1 where a block has arrived: `int64[nnz]` on the CPU.
        """
        self.sync()
        before = where(self.mask.positions, mask.positions, grid_shape(mask.shape, mask.block_size))
        # Whatever needs memory comes first: a move that finds none leaves the blocks where they are.
        self.originals.add(self.weight, mask.positions)
        values = self._dense_blocks(mask.positions.to(self.layout.positions.device)).to(self.blocks.dtype)
        stay = (before >= 0).to(values.device)
        values[stay] = self.whole_blocks()[before[before >= 0].to(values.device)]
        if generator is not None and self.weight.dtype == torch.bfloat16:
            leave = torch.ones(mask.nnz, dtype=torch.bool, device="cpu").index_fill_(0, before[before >= 0], False)
            leaving = self.whole_blocks()[leave.to(self.blocks.device)]
            positions = self.mask.positions[:, leave].to(self.weight.device)
            writer = writer_of(self.weight, positions, self.mask.block_size)
            writer.write(self.weight, round_stochastically(leaving, generator))
        self._go_to(mask)
        with torch.no_grad():
            self.put_blocks(values)
        self.follow_home()
        self.mark_synced()
        return before

    @property
    def graph_inputs(self) -> tuple[Tensor, ...]:
        """The tensors that a compiled pass which trains the blocks must be given."""
        return self.live_weight, self.live_blocks

    @property
    def kind(self) -> str:
        """The dtype of the base, as adapters write it."""
        return str(self.weight.dtype).removeprefix("torch.")

    def base_checksum(self) -> str:
        """Return the checksum of the base."""
        return checksum(self.base_weight())

    def checksum_outside(self, places: Tensor) -> str:
        """Return the checksum of the base without the blocks at `places int64[2, k]`, which training changes."""
        dense = self.base_weight()
        zeros = local(dense).new_zeros((places.shape[1], self.mask.block_size, self.mask.block_size))
        copier_of(dense, places.to(dense.device), self.mask.block_size).write(zeros)
        return checksum(dense)

    def values_at(self, places: Tensor) -> Tensor:
        """Return the trained values at `places int64[2, k]`: `[k, b, b]` in the weight's dtype, on its device."""
        return read_places(self.weight, places.to(self.weight.device), self.mask.block_size)

    def saved_left(self) -> dict[str, Tensor]:
        """Return what blocks have left behind, for states of schedules: nothing, since the dense weight holds it."""
        return {}

    def base_weight(self) -> Tensor:
        """Return a copy of the dense weight `[m, n]` as it was before training."""
        dense = self.weight.detach().clone()
        self.originals.restore(dense)
        return dense

    def left_behind(self) -> tuple[Tensor, Tensor]:
        """Return the places where blocks have been and are no more, and the weight's values there, on the CPU."""
        places = self.originals.places
        left = places[:, where(self.mask.positions, places, grid_shape(self.mask.shape, self.mask.block_size)) < 0]
        return left, self.values_at(left).cpu()

    def take_trained(self, blocks: Tensor, left: Tensor, values: Tensor | None, mask: BlockMask | None = None) -> None:
        """Take the values of another training of this base.

        Args:
            blocks: `[nnz, b, b]`, the values of the blocks.
            left: `int64[2, k]`, the other places that were trained, on the CPU.
            values: `[k, b, b]`, the weight's values there; None if there are none.
            mask: its places, as many as before, if it is another adapter's: what this one trained is forgotten.
        """
        self.check_enabled()
        with torch.no_grad():
            self.originals.restore(self.weight)
            if mask is not None:
                self.originals = Originals(self.weight, mask.positions, mask.block_size)
                self._go_to(mask)
            self.originals.add(self.weight, left)
            if values is not None:
                writer = writer_of(self.weight, left.to(self.weight.device), self.mask.block_size)
                writer.write(self.weight, values.to(self.weight.device))
            self.put_blocks(blocks)
        self.push()
        self.follow_home()

    def resume(
        self,
        mask: BlockMask,
        blocks: Tensor,
        places: Tensor,
        originals: Tensor,
        left: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Go on with a training that was interrupted: its blocks were at `mask` and had the values `blocks`.

        Args:
            mask: where the blocks were.
            blocks: `[nnz, b, b]`.
            places: `int64[2, k]`, every place where blocks had been, on the CPU.
            originals: `[k, b, b]`, the values from before training there.
            left: of a quantised weight, what `saved_left` returned.
        """
        # Places that were trained since then, in this process, go back to the values of the interrupted training.
        found = self._originals_with(places, originals)
        self._go_to(mask)
        self.originals, self.base_known = found, True
        with torch.no_grad():
            self.put_blocks(blocks)
        self.push()
        self.follow_home()

    def step_target(self) -> Target | None:
        """Return the dense weight as a target of an optimizer's kernel; None if it is written after the step."""
        blocks, weight, positions = self.blocks, self.weight, self.layout.positions
        if self.split is not None:
            # The weight is written after the step. A kernel need not know it unless blocks reach over its edges.
            if not any(size % self.mask.block_size for size in self.mask.shape):
                return None
            first, end = rows_of(blocks) if is_sharded(blocks) else (0, len(blocks))
            return Target(as_matrix(weight), positions[:, first:end], self.mask.block_size, by_address=False)
        reachable = blocks.device == weight.device == positions.device and weight.layout == torch.strided
        wide = blocks.dtype in (torch.float32, torch.float64) and weight.dtype in TYPES
        by_address = reachable and wide and blocks.is_contiguous() and positions.is_contiguous()
        return Target(as_matrix(weight), positions, self.mask.block_size, by_address)

    def _originals_with(self, places: Tensor, originals: Tensor) -> Originals:
        """Return `originals [k, b, b]` at `places int64[2, k]`, and what is known here at other places."""
        found = Originals(self.weight, places[:, :0], self.mask.block_size)
        found.put(places, originals)
        found.put_missing(self.originals)
        return found

    def _go_to(self, mask: BlockMask) -> None:
        """Let everything that depends on the places follow `mask`, but the values."""
        self.mask = mask
        self.layout.move(mask)
        self.writer = writer_of(self.weight, self.layout.positions, mask.block_size)
        self.moves += 1
