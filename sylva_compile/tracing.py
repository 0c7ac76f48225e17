"""`trace_and_mask`: run a model over some batches, estimate the curvature of every weight, choose its blocks."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, broadcast, get_rank, get_world_size
from torch.distributed import get_global_rank as global_rank
from tqdm.auto import tqdm

from sylva_compile import embedding
from sylva_compile.capture import capture_backend, compilations_forgotten
from sylva_compile.curvature.base import Curvature
from sylva_compile.curvature.baselines import SquaredGradient, magnitude_scores, random_scores
from sylva_compile.curvature.blockwise import BlockKfac
from sylva_compile.curvature.hodlr_kfac import HierarchicalKfac
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import DenseKfac
from sylva_compile.errors import ArgumentError, EmbeddingError, TraceError
from sylva_compile.kernels.observe import observing
from sylva_compile.masks import BlockMask, Masks, check_block_fits, check_block_size
from sylva_compile.scope import Scope, input_axis, owners_of, unwrap, weights_in_scope
from sylva_compile.selection import Allocation, Budget, select_blocks

log = logging.getLogger(__name__)

Method = Literal["sylva", "kfac", "fisher", "magnitude", "random"]
Score = Literal["gain", "paper"]
LossFn = Callable[[nn.Module, Any], Tensor]

_METHODS = ("sylva", "kfac", "fisher", "magnitude", "random")
_WITHOUT_DATA = ("magnitude", "random")


def trace_and_mask(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    scope: Scope = "all-linear",
    sparsity: float = 0.98,
    block_size: int = 64,
    num_partitions: int = 4,
    rank: int = 8,
    num_samples: int = 1024,
    method: Method = "sylva",
    score: Score = "gain",
    allocation: Allocation = "layer",
    column_budget: float | None = None,
    damping: float | None = None,
    loss_fn: LossFn | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
) -> Masks:
    """Choose the blocks of each weight that are worth training.

    The model runs forward and backward over batches of `loader` in evaluation mode (no dropout), compiled by a backend
    that shows every weight gradient's operands to an estimator. It is left as it was found: mode, `requires_grad`,
    gradients, hooks, random state.

    Args:
        model: the model to fine-tune, in memory, not yet embedded.
        loader: batches; None with "magnitude" and "random". A mapping is called as `model(**batch).loss`.
        scope: "all-linear" (every Linear and Conv1D but the output head), a regular expression for the whole module
            name, or a list of module-name endings; as PEFT's `target_modules`.
        sparsity: share of each weight's blocks that stays frozen, in [0, 1).
        block_size: b, at least 8.
        num_partitions: depth K of the hierarchical factors (`score="paper"` with "sylva").
        rank: rank r of their off-diagonal parts.
        num_samples: sequences to trace over all ranks; a loader that ends early is used up, and the log says so.
        method: "sylva", "kfac" (exact dense factors), "fisher" (squared gradients), "magnitude" or "random".
        score: for "sylva" and "kfac": "gain", half a block's Newton decrement, or "paper", eqn 19 and 20.
        allocation: "layer" (every weight keeps its share) or "global" (the best blocks of all weights).
        column_budget: at most this fraction of a weight's input block columns holds blocks; None: no limit.
        damping: fraction of a factor's mean diagonal that is added to it; None: 0.1 for "gain", 1e-3 for "paper".
        loss_fn: `loss_fn(model, batch) -> scalar`, for batches that are no mappings or models without `.loss`.
        process_group: every rank traces its share of the samples, and all end with the same masks.
        progress: show a progress bar.

    Returns:
        Masks bound to `model`, in the model's order of weights.

    Raises:
        ArgumentError, ScopeError: an argument, or a weight in scope, cannot be used.
        EmbeddingError: the model carries blocks already.
        TraceError: no batches, no loss, a loss that is not finite or reaches no weight in scope.
    """
    model = unwrap(model)
    budget = Budget(sparsity, allocation, column_budget)
    check_block_size(block_size)
    _check_choices(method, score, num_samples, damping)
    if embedding.sites(model):
        raise EmbeddingError(
            "The model carries blocks already; call sylva_compile.unload_adapter(model) before tracing."
        )
    weights = weights_in_scope(model, scope)
    check_block_fits(block_size, weights)
    axes = {name: input_axis(next(iter(owners_of(model, weight)))[0]) for name, weight in weights.items()}

    if method == "magnitude":
        scores = {name: magnitude_scores(weight, block_size) for name, weight in weights.items()}
    elif method == "random":
        with torch.random.fork_rng(devices=[]):
            scores = {name: random_scores(weight, block_size) for name, weight in weights.items()}
    else:
        if loader is None:
            raise ArgumentError(
                f"method={method!r} needs a loader of batches; give one, or use 'magnitude' or 'random'."
            )

        shared = InputFactors(num_partitions, rank)

        def new_estimator(name: str) -> Curvature:
            weight = weights[name]
            outputs, inputs = weight.shape if axes[name] == 1 else reversed(weight.shape)
            if method == "fisher":
                return SquaredGradient(weight, outputs, inputs)
            if method == "sylva" and score == "gain":
                return BlockKfac(weight, outputs, inputs, block_size=block_size, damping=damping)
            if method == "sylva":
                return HierarchicalKfac(
                    weight,
                    outputs,
                    inputs,
                    depth=num_partitions,
                    rank=rank,
                    score=score,
                    damping=damping,
                    shared=shared,
                    reader=name,
                )
            return DenseKfac(weight, outputs, inputs, score=score, damping=damping)

        estimators = {name: new_estimator(name) for name in weights}
        share = num_samples
        if process_group is not None:
            ranks = get_world_size(process_group)
            share = num_samples // ranks + (get_rank(process_group) < num_samples % ranks)
        seen = _observe(model, weights, estimators, loader, loss_fn, share, progress, after_batch=shared.end_batch)
        if process_group is not None:
            if shared.groups():
                shared.combine(process_group)
            for name in weights:
                estimators[name].combine(process_group)
        scores = {}
        for name in seen:
            found = estimators.pop(name).block_scores(block_size)
            shared.forget(name)
            scores[name] = found if axes[name] == 1 else found.t()
    maps = select_blocks(scores, budget, axes)
    if process_group is not None:
        _agree(maps, process_group)
    blocks = {name: BlockMask.from_block_map(chosen, weights[name].shape, block_size) for name, chosen in maps.items()}
    config = {
        "method": method,
        "score": score,
        "scope": scope if isinstance(scope, str) else list(scope),
        "sparsity": sparsity,
        "block_size": block_size,
        "num_partitions": num_partitions,
        "rank": rank,
        "num_samples": num_samples,
        "allocation": allocation,
        "column_budget": column_budget,
        "damping": damping,
        "torch": torch.__version__,
    }
    return Masks(blocks, model=model, config=config)


def _check_choices(method: str, score: str, num_samples: int, damping: float | None) -> None:
    if method not in _METHODS:
        raise ArgumentError(f"method={method!r}; use one of {', '.join(_METHODS)}.")
    if score not in ("gain", "paper"):
        raise ArgumentError(f"score={score!r}; use 'gain' or 'paper'.")
    if num_samples < 1:
        raise ArgumentError(f"num_samples={num_samples!r}; use a number of sequences of 1 or more.")
    if damping is not None and not damping > 0:
        raise ArgumentError(f"damping={damping!r}; use None or a fraction above 0.")


def _observe(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    estimators: Mapping[str, Curvature],
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    num_samples: int,
    progress: bool,
    after_batch: Callable[[], None],
) -> list[str]:
    """Feed the estimators from `loader`, and call `after_batch` after each backward pass.

    Returns the names of the weights that were seen, in order.
    """
    names = {weight.data_ptr(): name for name, weight in weights.items()}
    seen: set[str] = set()
    missed: dict[str, str] = {}
    checks: dict[str, Tensor] = {}
    sequences = 0

    def listen(weight: Tensor, lhs: Tensor, rhs: Tensor, activation_is_lhs: bool) -> None:
        name = names[weight.data_ptr()]
        inputs, gradients = (lhs, rhs) if activation_is_lhs else (rhs, lhs)
        # The loss is a mean over the batch; its sum over sequences is what adds up over batches.
        gradients = gradients * sequences
        checks[name] = gradients.sum().float()
        estimators[name].update(inputs.detach(), gradients.detach())
        seen.add(name)

    def miss(weight: Tensor, reason: str) -> None:
        name = names.get(weight.data_ptr())
        if name is not None:
            missed[name] = reason

    device = next(iter(weights.values())).device
    total = 0
    with _untouched(model, weights.values()), compilations_forgotten(), observing(listen):
        compiled = torch.compile(model, backend=capture_backend(miss))
        bar = tqdm(total=num_samples, desc="tracing", unit="seq", disable=not progress)
        with bar, torch.enable_grad():
            for batch in loader:
                batch = _to_device(batch, device)
                sequences = _count_sequences(batch)
                loss = _loss_of(compiled, batch, loss_fn)
                _check_loss(model, loss, batch, loss_fn, weights)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                _check_gradients(checks, seen, gradients, weights, missed)
                checks.clear()
                after_batch()
                total += sequences
                bar.update(min(sequences, num_samples - bar.n))
                if total >= num_samples:
                    break
    if total == 0:
        raise TraceError("The loader gave no batches; give one with data (an iterator is used up after one pass).")
    if total < num_samples:
        log.warning(
            "The loader ended after %d of num_samples=%d sequences; the masks are from these.", total, num_samples
        )
    unseen = [name for name in weights if name not in seen]
    if len(unseen) == len(weights):
        name = unseen[0]
        why = missed.get(name, "no gradient reaches it")
        raise TraceError(
            f"No weight in scope could be observed; the first, {name}: {why}. Check the loss and the scope."
        )
    for name in unseen:
        why = missed.get(name, "the loss does not depend on it")
        log.warning("%s gets no mask: %s.", name, why)
    return [name for name in weights if name in seen]


@contextmanager
def _untouched(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for `weights` alone and no key-value cache inside; everything as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    # A model compiled in place would run its own graphs instead of ours.
    compiled = {module: module._compiled_call_impl for module in modes if module._compiled_call_impl is not None}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {parameter.device for parameter in flags if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.eval()
            for module in compiled:
                module._compiled_call_impl = None
            for parameter in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            if use_cache:
                config.use_cache = False  # type: ignore[union-attr]
            yield
        finally:
            if use_cache:
                config.use_cache = use_cache  # type: ignore[union-attr]
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            for module, call in compiled.items():
                module._compiled_call_impl = call
            for module, mode in modes.items():
                module.training = mode


def _to_device(batch: Any, device: torch.device) -> Any:
    move = getattr(batch, "to", None)
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple) and type(batch) in (list, tuple):
        return type(batch)(_to_device(value, device) for value in batch)
    return move(device) if move is not None else batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, batch.values()))
    elif isinstance(batch, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, batch))


def _count_sequences(batch: Any) -> int:
    return next((tensor.shape[0] for tensor in _tensors(batch) if tensor.dim() > 0), 1)


def _loss_of(model: Callable[..., Any], batch: Any, loss_fn: LossFn | None) -> Tensor:
    loss: Any
    if loss_fn is not None:
        loss = loss_fn(model, batch)  # type: ignore[arg-type]
    elif isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
    else:
        raise TraceError(f"A batch is a {type(batch).__name__}, not a mapping; give loss_fn=lambda model, batch: ...")
    if not isinstance(loss, Tensor):
        hint = "put labels into the batches, or give loss_fn" if loss_fn is None else "return a scalar tensor"
        raise TraceError(f"A batch has no loss ({type(loss).__name__} came back); {hint}.")
    if loss.numel() != 1:
        raise TraceError(f"The loss has shape {tuple(loss.shape)}; return a scalar, such as its mean.")
    return loss


def _check_loss(
    model: nn.Module, loss: Tensor, batch: Any, loss_fn: LossFn | None, weights: Mapping[str, nn.Parameter]
) -> None:
    if not loss.requires_grad:
        first = next(iter(weights))
        raise TraceError(f"The loss has no gradient, not even to {first}; look for detach, no_grad or integer outputs.")
    if not bool(torch.isfinite(loss)):
        layer = _first_not_finite(model, batch, loss_fn)
        raise TraceError(
            f"The loss is {loss.item()}; the first values that are not finite leave {layer}. Mend the data or dtype."
        )


def _first_not_finite(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> str:
    """The first layer, in order of execution, with an output that is not finite; runs the model uncompiled once."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output.values() if isinstance(output, Mapping) else [output]
            if not found and any(
                t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in _tensors(list(values))
            ):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            _loss_of(model, batch, loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    return f"layer {found[0]}" if found else "the loss function"


def _check_gradients(
    checks: Mapping[str, Tensor],
    seen: set[str],
    gradients: tuple[Tensor | None, ...],
    weights: Mapping[str, nn.Parameter],
    missed: dict[str, str],
) -> None:
    """Raise on output gradients that are not finite; note weights whose gradient came from outside compiled graphs."""
    if checks and not bool(torch.isfinite(torch.stack(list(checks.values()))).all()):
        bad = next(name for name in weights if name in checks and not bool(torch.isfinite(checks[name])))
        raise TraceError(
            f"The loss is finite but the output gradient of {bad} is not; scale the loss or widen its dtype."
        )
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None and name not in seen:
            missed.setdefault(name, "it runs outside of the graphs that torch.compile makes")


def _agree(maps: dict[str, Tensor], group: ProcessGroup) -> None:
    """Give every rank of `group` the block maps of its first rank."""
    for chosen in maps.values():
        shared = chosen.to(torch.uint8).contiguous()
        broadcast(shared, src=global_rank(group, 0), group=group)
        chosen.copy_(shared.bool())
