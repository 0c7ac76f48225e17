"""Run a model over batches, pass the operands of every weight gradient to a listener, and restore the model."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sylva_compile._torch import compiled_call, set_compiled_call
from sylva_compile.blocks import registry
from sylva_compile.blocks.compile_units import caching_configurations
from sylva_compile.errors import TraceError
from sylva_compile.kernels.observe import observing
from sylva_compile.tracing.batches import LossFn, count_sequences, loss_of, tensors_of, to_device
from sylva_compile.tracing.capture import capture_backend, compilations_forgotten, compile_layers_or_model
from sylva_compile.tracing.progress import TraceProgress
from sylva_compile.tracing.ranks import NO_BATCHES
from sylva_compile.tracing.sightings import Sightings

log = logging.getLogger(__name__)

_END = object()


class Listener(Protocol):
    """Receives the operands of weight gradients, weight by weight and batch by batch."""

    def update(self, name: str, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None, /) -> None:
        """Receive `inputs [T, n]` and `output_gradients [T, m]` of a weight, for the loss summed over sequences.

        For stacked experts, tokens are sorted by expert, and `offsets [E]` says where those of each end.
        """

    def end_batch(self) -> None:
        """Note that the backward pass of the batch is over."""


def observe(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    listener: Listener,
    loader: Iterable[Any],
    *,
    num_samples: int,
    loss_fn: LossFn | None = None,
    progress_bar: bool = False,
    start: TraceProgress | None = None,
    after_batch: Callable[[TraceProgress], None] | None = None,
) -> TraceProgress:
    """Pass the operands of the gradients of `weights` to `listener`, over batches of `loader`.

    Args:
        model: the model to run, in evaluation mode; it is restored at the end.
        weights: the weights to observe, by name, as stored.
        listener: receives the operands, and the end of every batch.
        loader: the batches; see `trace_and_mask`.
        num_samples: the number of sequences after which to stop.
        loss_fn: see `trace_and_mask`.
        progress_bar: whether to show a progress bar.
        start: the progress of an interrupted observation; `loader` then gives the batches that follow.
        after_batch: called with the progress after every batch.

    Returns:
        The progress at the end, that of `start` included.

    Raises:
        TraceError: two Parameters share memory, no batches, no loss, a loss or gradient that is not finite, or a
            `start` with more batches than `num_samples` asks for.
    """
    names: dict[int, str] = {}
    for name, weight in weights.items():
        if (twin := names.setdefault(weight.data_ptr(), name)) != name:
            raise TraceError(f"{twin} and {name} are two Parameters in the same memory; assign one to both modules.")
    done = start or TraceProgress()
    if done.sequences - done.latest >= num_samples:
        raise TraceError(
            f"The checkpoint holds {done.sequences} sequences already, and {num_samples} are wanted; ask for as many, "
            "or delete it to trace from the start."
        )
    sightings = Sightings(names, listener.update, done)
    device = next(iter(weights.values())).device
    with untouched(model, weights.values()), compilations_forgotten(), observing(sightings.listen):
        backend = capture_backend(sightings.miss)
        compiled, waiting = compile_layers_or_model(model, weights.values(), backend)
        bar = tqdm(
            total=num_samples,
            initial=min(done.sequences, num_samples),
            desc="tracing",
            unit="seq",
            disable=not progress_bar,
        )
        batches = iter(loader)
        if done.sequences >= num_samples:
            # No sequence is left to observe, but this call makes a checkpoint compare the batches that it skips.
            next(batches, _END)
        with bar, torch.enable_grad():
            while done.sequences < num_samples:
                batch = next(batches, _END)
                if batch is _END:
                    break
                batch = to_device(batch, device)
                sequences = count_sequences(batch)
                # loss_fn gets its own containers: it may pop the labels, which `_check_loss` needs in `batch`.
                loss = loss_of(compiled, to_device(batch, device), loss_fn)
                if waiting:
                    # The model does not call these layers, but parts of them. Nothing has been observed yet.
                    waiting.clear()
                    for module in model.modules():
                        set_compiled_call(module, None)
                    compiled = torch.compile(model, backend=backend)  # type: ignore[assignment]
                    loss = loss_of(compiled, to_device(batch, device), loss_fn)
                check_loss(loss, weights, partial(_first_not_finite, model, batch, loss_fn))
                # The loss is a mean over the batch; only a sum over sequences can be added up over batches.
                gradients = torch.autograd.grad(loss * sequences, list(weights.values()), allow_unused=True)
                sightings.check(weights, gradients)
                listener.end_batch()
                done.batches += 1
                done.sequences += sequences
                done.latest = sequences
                bar.update(min(sequences, num_samples - bar.n))
                if after_batch is not None:
                    after_batch(done)
    if done.sequences == 0:
        raise TraceError(NO_BATCHES)
    warn_of_early_end(done, num_samples)
    return done


def warn_of_early_end(done: TraceProgress, num_samples: int) -> None:
    """Warn if fewer than `num_samples` sequences came."""
    if done.sequences < num_samples:
        log.warning(
            "The loader ended after %d of num_samples=%d sequences; the masks are from these.",
            done.sequences,
            num_samples,
        )


def observed(weights: Iterable[str], progress: TraceProgress) -> list[str]:
    """Return those of `weights` whose whole gradient was observed; the log names the others.

    Raises:
        TraceError: no weight's whole gradient was observed.
    """
    missed = {
        name: progress.missed.get(name, "the loss does not depend on it")
        for name in weights
        if name in progress.missed or name not in progress.seen
    }
    found = [name for name in weights if name not in missed]
    if not found:
        name, why = next(iter(missed.items()))
        raise TraceError(
            f"No weight in scope could be observed; the first, {name}: {why}. Check the loss and the scope."
        )
    for name, why in missed.items():
        log.warning("%s gets no mask: %s.", name, why)
    return found


@contextmanager
def untouched(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put the model into evaluation mode inside the block, and restore it afterwards.

    Inside, only `weights` require grad, and the key-value cache and calls compiled in place are off. Afterwards all of
    this and the random state are as before.
    """
    modes = {module: module.training for module in model.modules()}
    # A model compiled in place would run its own graphs in place of those of the capture backend.
    compiled = {module: call for module in modes if (call := compiled_call(module)) is not None}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configurations = caching_configurations(model)
    devices = {parameter.device for parameter in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), registry.traced():
        try:
            # model.eval() would make some layers merge weights, and un-merging would not restore the same bits.
            for module in modes:
                module.training = False
            for module in compiled:
                set_compiled_call(module, None)
            for parameter in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            for config in configurations:
                config.use_cache = False
            yield
        finally:
            for module in modes:
                set_compiled_call(module, compiled.get(module))
            for config in configurations:
                config.use_cache = True
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode


def check_loss(loss: Tensor, weights: Iterable[str], first_not_finite: Callable[[], str] | None = None) -> None:
    """Raise TraceError if `loss` has no gradient or is not finite.

    Args:
        loss: the scalar.
        weights: the names of the weights to observe.
        first_not_finite: says where the first values that are not finite come from.
    """
    if not loss.requires_grad:
        first = next(iter(weights))
        raise TraceError(f"The loss has no gradient, not even to {first}; look for detach, no_grad or integer outputs.")
    if not bool(torch.isfinite(loss)):
        if first_not_finite is None:
            raise TraceError(f"The loss is {loss.item()}. Mend the data or dtype.")
        layer = first_not_finite()
        raise TraceError(
            f"The loss is {loss.item()}; the first values that are not finite leave {layer}. Mend the data or dtype."
        )


def _first_not_finite(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> str:
    """Name the first layer, in order of execution, whose output is not finite; run the model uncompiled once."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output.values() if isinstance(output, Mapping) else [output]
            if not found and any(
                t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors_of(list(values))
            ):
                found.append(name)

        return hook

    # Dynamo would warn of the hooks in compiled layers.
    for module in model.modules():
        set_compiled_call(module, None)
    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            loss_of(model, batch, loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    return f"layer {found[0]}" if found else "the loss function"
