"""A `BlockState`: one embedded weight, its trainable blocks, and the rule that keeps both one value.

The invariant: a dense weight's blocks always equal its `<name>_blocks` parameter, rounded to the weight's dtype. The
blocks are the masters.

| what changed since the two agreed         | what happens                                                            |
| ----------------------------------------- | ----------------------------------------------------------------------- |
| blocks (an optimizer, an edit in place)   | written into the dense weight                                           |
| the dense weight, in place                | blocks are read; the base is not known any more                         |
| both                                      | blocks win: they hold more bits                                         |
| the dense weight, by loading or assigning | blocks are read; one that differs outside of the blocks is a new base   |

`sync` applies the table, before anything looks at either: forward passes, steps, moves, copies, state dicts.
"""

import functools
import logging
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sylva_compile.blocks.layout import BlockLayout
from sylva_compile.kernels.blocks import BlockWriter, block_dtype, read_blocks

if TYPE_CHECKING:
    from sylva_compile.blocks.masks import BlockMask

log = logging.getLogger(__name__)


class BlockState:
    """One embedded weight: the dense Parameter, its blocks, and what is needed to keep them equal and to undo them."""

    changes: ClassVar[int] = 0
    """Grows whenever a site comes, goes, or gets other tensors; until then, the `id` of a tensor tells whose it is."""

    def __init__(self, name: str, weight: nn.Parameter, mask: "BlockMask", axis: int) -> None:
        """Read the blocks of `weight` at `mask`; nothing is changed yet."""
        self.name = name
        self.mask = mask
        self.weight = weight
        self.was_trainable = weight.requires_grad
        self.layout = BlockLayout(mask, axis, weight.device)
        self.writer = BlockWriter(mask.shape, torch.stack([mask.rows, mask.cols]), mask.block_size).to(weight.device)
        values = self._dense_blocks()
        self.base = values.to("cpu", copy=True)
        """The blocks before training, in the weight's dtype, on the host; `unload_adapter` restores them."""
        self.base_known = True
        self.had_gradient = False
        self._owners: list[tuple[weakref.ref[nn.Module], str]] = []
        self.blocks = nn.Parameter(values.to(block_dtype(weight.dtype)).contiguous())
        self.mark_synced()
        _alive.add(self)
        BlockState.changes += 1

    def __getstate__(self) -> dict[str, Any]:
        """All but the owners, who are other modules in a copy."""
        return self.__dict__ | {"_owners": []}

    def own(self, module: nn.Module, attribute: str) -> None:
        """Note that `module` holds the weight as `attribute`."""
        self._owners.append((weakref.ref(module), attribute))

    def owners(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules that hold the weight, each with the attribute."""
        for ref, attribute in self._owners:
            if (module := ref()) is not None:
                yield module, attribute

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled site is alive too: its blocks are followed like any other's."""
        self.__dict__.update(state)
        self.mark_synced()
        _alive.add(self)
        BlockState.changes += 1

    def sync(self) -> None:
        """Repair the invariant after an edit in place that autograd's version counters have seen."""
        weight_version, blocks_version = self._versions
        if self.blocks._version != blocks_version:
            self.write()
        elif self.weight._version != weight_version:
            self.base_known = False
            self.read()

    def read(self) -> None:
        """Take the blocks from the dense weight. Masters that still round to the dense value keep their low bits."""
        with torch.no_grad():
            dense = self._dense_blocks()
            unchanged = self.blocks.to(dense.dtype) == dense
            self.blocks.copy_(torch.where(unchanged, self.blocks, dense.to(self.blocks.dtype)))
        self.mark_synced()

    def write(self) -> None:
        """Write the blocks, rounded, into the dense weight."""
        self.writer.write(self.weight, self.blocks)
        self.mark_synced()

    def mark_synced(self) -> None:
        """Note that weight and blocks agree now; a kernel that wrote both by address says so this way."""
        self._versions = (self.weight._version, self.blocks._version)

    def replaced(self, old: Tensor) -> None:
        """Follow a dense weight that was loaded or assigned; `old [m, n]` is a copy of what was there before.

        A weight that differs outside of the blocks is another base: what it holds in the blocks is what
        `unload_adapter` restores from now on. One that is the same there is a resumed training of this base.
        """
        BlockState.changes += 1
        new, nothing = self.weight.detach().clone(), torch.zeros_like(self.blocks)
        self.writer.write(new, nothing)
        self.writer.write(old, nothing)
        if not torch.equal(new, old):
            _say_another_base()
            self.base = self._dense_blocks().to("cpu", copy=True)
            self.base_known = True
        self.read()

    def moved(self, weight: nn.Parameter, blocks: nn.Parameter, masters: Tensor) -> None:
        """Follow the module's tensors to another device or dtype; `masters` are the blocks before the move."""
        BlockState.changes += 1
        self.weight, self.blocks = weight, blocks
        wide = block_dtype(weight.dtype)
        if blocks.dtype != wide:
            gradient, blocks.grad = blocks.grad, None
            blocks.data = masters.to(device=blocks.device, dtype=wide)
            blocks.grad = None if gradient is None else gradient.to(wide)
        if weight.device.type != "meta":
            self.layout.to(weight.device)
            self.writer.to(weight.device)
            self.write()

    def is_synced(self) -> bool:
        """Whether the dense weight's blocks equal the rounded blocks (waits for the device)."""
        dense = self._dense_blocks()
        rounded = self.inside(self.blocks.detach().to(dense.dtype))
        # What became NaN has no one bit pattern.
        return bool(((dense == rounded) | (dense.isnan() & rounded.isnan())).all())

    def base_weight(self) -> Tensor:
        """A copy of the dense weight `[m, n]` with the blocks as they were before training."""
        dense = self.weight.detach().clone()
        self.writer.write(dense, self.base.to(dense.device))
        return dense

    def restore_base(self) -> None:
        """Write the blocks from before training into the dense weight."""
        self.writer.write(self.weight, self.base.to(self.weight.device))

    def release(self) -> None:
        """Stop following: the blocks are about to go."""
        BlockState.changes += 1
        _alive.discard(self)

    def inside(self, blocks: Tensor) -> Tensor:
        """`blocks [nnz, b, b]` with everything that reaches over the weight's edge set to zero."""
        b, (m, n) = self.mask.block_size, self.mask.shape
        if m % b == 0 and n % b == 0:
            return blocks
        lane = torch.arange(b, device=blocks.device)
        rows, cols = self.layout.positions
        row_inside = rows[:, None] * b + lane < m
        col_inside = cols[:, None] * b + lane < n
        return torch.where(row_inside[:, :, None] & col_inside[:, None, :], blocks, 0)

    def _dense_blocks(self) -> Tensor:
        return read_blocks(self.weight.detach(), self.layout.positions, self.mask.block_size)


_alive: "weakref.WeakSet[BlockState]" = weakref.WeakSet()


def live_states() -> Iterator[BlockState]:
    """Every embedded weight alive in the process."""
    return iter(list(_alive))


@functools.cache
def _say_another_base() -> None:
    """Once a process: a model has hundreds of weights."""
    log.warning(
        "What was loaded differs from the base outside of the blocks too, and is the base from now on. If it comes "
        "from a training with other masks, load those masks first (Masks.load)."
    )


def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Repair what was edited by hand before any optimizer's step; a few integer comparisons when nothing was."""
    for site in live_states():
        site.sync()
        site.had_gradient = site.blocks.grad is not None


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Write what an optimizer has stepped into the dense weights."""
    # Not every optimizer moves the version counters (`p.data.add_`, raw pointers): what it holds and had a gradient
    # for, before the step or from its closure, is written regardless; without a gradient, if it is another value now.
    # The project's own do, and their kernel has written through already.
    moves_versions = getattr(optimizer, "writes_through", False)
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for site in live_states():
        if id(site.blocks) not in stepped:
            continue
        if moves_versions:
            site.sync()
        elif site.had_gradient or site.blocks.grad is not None or not site.is_synced():
            site.write()
