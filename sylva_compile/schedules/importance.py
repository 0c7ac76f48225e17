"""The loss of a batch while the trained change of some weights is scaled down, for `LayerSchedule`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, get_world_size

from sylva_compile._torch import compiled_call, set_compiled_call
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.shards import read_places, writer_of
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.tracing.batches import LossFn, loss_of, to_device


class Batches:
    """The batches of a loader, begun again when it ends.

    Attributes:
        taken: the number of batches taken so far.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        """Take nothing yet."""
        self._loader = loader
        self.skip(0)

    def skip(self, count: int) -> None:
        """Begin anew, and skip `count` batches when the next one is taken."""
        self.taken = count
        self._iterator: Iterator[Any] | None = None

    def take(self) -> Any:
        """Return the next batch. Raises ArgumentError if there is none."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
            for _ in range(self.taken):
                self._next()
        batch = self._next()
        self.taken += 1
        return batch

    def _next(self) -> Any:
        for _ in range(2):
            assert self._iterator is not None
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self._loader)
        raise ArgumentError("batches is empty, or an iterator that has ended; give a loader that can be begun again.")


def suppressed_losses(
    model: nn.Module,
    actions: Iterable[Sequence[BlockState]],
    factor: float,
    batches: Batches,
    loss_fn: LossFn | None,
    group: ProcessGroup | None,
) -> Tensor:
    """Return the loss of the next batch for each of `actions`, in evaluation mode, averaged over the ranks of `group`.

    Models compiled in place run uncompiled. Weights, blocks, mode and random state are left as they were found.

    Args:
        model: the embedded model.
        actions: the weights whose trained change is scaled down together.
        factor: what is left of it.
        batches: one is taken.
        loss_fn: `loss_fn(model, batch) -> scalar`; None: `model(**batch).loss`.
        group: None: the losses of this process.

    Returns:
        `float64[actions]` on the CPU.
    """
    devices = list({parameter.device for parameter in model.parameters()})
    losses = []
    # Loaders draw from the global generators too, and what training draws must not depend on that.
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]), _evaluation(model):
        batch = to_device(batches.take(), next(model.parameters()).device)
        for states in actions:
            with _suppressed(states, factor):
                losses.append(loss_of(model, batch, loss_fn).detach().reshape(()))
    found = torch.stack(losses)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    if group is not None:
        all_reduce(found, group=group)
        found /= get_world_size(group)
    return found.to("cpu", torch.float64)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the block, without gradients and without calls compiled in place."""
    modes = {module: module.training for module in model.modules()}
    # Dynamo keeps eight graphs of a function. Layers that are opened and closed need all of them for training: four,
    # and four again for any length of a sequence.
    compiled = {module: call for module in modes if (call := compiled_call(module)) is not None}
    try:
        for module in compiled:
            set_compiled_call(module, None)
        # model.eval() would make some layers merge weights, and un-merging would not restore the same bits.
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, call in compiled.items():
            set_compiled_call(module, call)


def check_may_suppress(states: Iterable[BlockState]) -> None:
    """Raise ArgumentError where a weight has no dense values in which its change could be suppressed."""
    for state in states:
        if state.is_quantised:
            raise ArgumentError(
                f"{state.name} is quantised, and its change cannot be suppressed in place; use policy='random'."
            )


@contextmanager
def _suppressed(states: Sequence[BlockState], factor: float) -> Iterator[None]:
    """Let the dense weights hold `base + factor * (trained - base)` inside the block; the blocks are left alone."""
    for state in states:
        state.sync()
        state.check_base_known()
    places = [state.originals.places.to(state.weight.device) for state in states]
    trained = [read_places(state.weight, at, state.mask.block_size) for state, at in zip(states, places, strict=True)]
    try:
        for state, at, values in zip(states, places, trained, strict=True):
            wide = block_dtype(values.dtype)
            base = state.originals.values.to(values.device, wide)
            # What blocks have left behind is trained change too.
            _write(state, at, base + factor * (values.to(wide) - base))
            base, blocks = state.originals.at(state.mask.positions).to(values.device, wide), state.whole_blocks()
            _write(state, state.layout.positions, base + factor * (blocks - base))
        yield
    finally:
        for state, at, values in zip(states, places, trained, strict=True):
            _write(state, at, values)


def _write(state: BlockState, places: Tensor, values: Tensor) -> None:
    """Write `values [k, b, b]` at `places` into the dense weight, so that no sync takes them for an edit."""
    writer_of(state.weight, places, state.mask.block_size).write(state.weight, values)
    state.follow_home()
    state.mark_synced()
