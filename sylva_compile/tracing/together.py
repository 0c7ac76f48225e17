"""`observe_together`: run a model that `fully_shard` has split over batches, on all processes in step.

Each pass gathers weights, so no process may leave one out or end before the others. A process without a batch repeats
its last one, which does not count. Errors of the library are exchanged at fixed points of each batch. An error of the
model or of `loss_fn` on one process alone, or a batch that they cannot take, leaves the others waiting, as in training.

The processes add up mean gradients together (see `curvature.gradient_sum`), a layer at a time: when a backward pass
leaves a layer that they all run. The rest follows at the end of each batch. None of these messages depends on anything
that one process alone knows.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from tqdm.auto import tqdm

from sylva_compile._torch import compiled_call, set_compiled_call
from sylva_compile.blocks.scope import owners_of
from sylva_compile.blocks.shards import compute_device, split_modules
from sylva_compile.errors import TraceError
from sylva_compile.kernels.observe import observing
from sylva_compile.tracing.batches import LossFn, count_sequences, loss_of, tensors_of, to_device
from sylva_compile.tracing.capture import capture_backend, compilations_forgotten
from sylva_compile.tracing.compile_parts import CompiledParts
from sylva_compile.tracing.observation import Listener, check_loss, untouched, warn_of_early_end
from sylva_compile.tracing.probes import probes
from sylva_compile.tracing.progress import TraceProgress
from sylva_compile.tracing.ranks import together, turns
from sylva_compile.tracing.sharded import between_passes
from sylva_compile.tracing.sightings import Sightings


class SharedListener(Listener, Protocol):
    """A listener on one of several processes."""

    def waiting(self) -> list[str]:
        """Return the names of the weights whose operands wait for `settle`."""

    def settle(self, names: Collection[str], /) -> None:
        """Use the operands of the weights `names`; all processes call this, with operands or without."""


def observe_together(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    listener: SharedListener,
    loader: Iterable[Any],
    group: ProcessGroup,
    *,
    num_samples: int,
    loss_fn: LossFn | None = None,
    progress_bar: bool = False,
) -> TraceProgress:
    """Pass the operands of the gradients of `weights`, split over `group`, to `listener`; otherwise as `observe`.

    Returns:
        The progress of this process.

    Raises:
        TraceError: as `observe` does, on all processes if one has cause.
    """
    done, failures = TraceProgress(), list[Exception]()
    counts, losses = True, list[Tensor]()

    def attempt(work: Callable[..., None], *arguments: Any) -> None:
        """Keep an error until the processes exchange theirs: they may wait for this one in the middle of a pass."""
        try:
            work(*arguments)
        except Exception as error:
            failures.append(error)

    def update(name: str, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None) -> None:
        if counts:
            attempt(listener.update, name, inputs, output_gradients, offsets)

    device = compute_device(next(iter(weights.values())))
    with ExitStack() as stack:
        stack.enter_context(between_passes(model))
        stack.enter_context(untouched(model, []))
        leaves = stack.enter_context(probes(model, weights))
        stack.enter_context(compilations_forgotten())
        sightings = Sightings({leaf.data_ptr(): name for name, leaf in leaves.items()}, update, done)
        parts = CompiledParts(model, weights, capture_backend(sightings.miss), stack)
        _settle_after_layers(model, weights, lambda names: attempt(listener.settle, names))

        def forward() -> bool:
            """Compute the loss, and return whether the model has left out a compiled layer."""
            loss = loss_of(model, to_device(batch, device), loss_fn)
            check_loss(loss, weights)
            losses[:] = [loss]
            return parts.left_out

        def check() -> list[str]:
            """Check the gradients, and return the weights whose operands wait."""
            sightings.check(weights, gradients)
            return listener.waiting()

        bar = tqdm(total=num_samples, desc="tracing", unit="seq", disable=not progress_bar)
        with bar, torch.enable_grad(), observing(sightings.listen):
            for batch, counts in turns(loader, lambda: done.sequences < num_samples, group, failures):
                sequences = count_sequences(batch)
                # Other errors may come from the middle of a pass, where there is nobody to exchange them with.
                if any(together(forward, group, TraceError)) and not done.batches:
                    parts.without_layers()
                    together(forward, group, TraceError)
                # The loss is a mean over the batch; only a sum over sequences can be added up over batches.
                loss = losses.pop() * sequences
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                del loss
                late = together(check, group)
                attempt(listener.settle, {name for names in late for name in names})
                attempt(listener.end_batch)
                if counts:
                    done.batches += 1
                    done.sequences += sequences
                    done.latest = sequences
                    bar.update(min(sequences, num_samples - bar.n))
    warn_of_early_end(done, num_samples)
    return done


def _settle_after_layers(
    model: nn.Module, weights: Mapping[str, nn.Parameter], settle: Callable[[list[str]], None]
) -> None:
    """Let `settle` be called with a compiled layer's weights when a backward pass leaves the layer.

    All processes run the layers in which `fully_shard` gathers weights. Others settle at the end of the batch.
    """
    held = {name: {owner for owner, _ in owners_of(model, weight)} for name, weight in weights.items()}
    for module in model.modules():
        call = compiled_call(module)
        if call is not None and split_modules(module):
            inside = set(module.modules())
            names = [name for name, owners in held.items() if owners & inside]
            set_compiled_call(module, _settling(call, names, settle))


def _settling(call: Callable[..., Any], names: list[str], settle: Callable[[list[str]], None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        entered = next((tensor for tensor in tensors_of([*args, kwargs]) if tensor.requires_grad), None)
        if entered is not None and not entered.is_leaf:
            entered.register_hook(lambda gradient: settle(names))
        return call(*args, **kwargs)

    return run
