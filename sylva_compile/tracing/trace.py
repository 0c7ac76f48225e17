"""`trace_and_mask`: run a model over some batches, estimate the curvature of every weight, choose its blocks."""

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_gather_object, broadcast_object_list, get_rank, get_world_size
from torch.distributed import get_global_rank as global_rank

from sylva_compile.blocks import embedding
from sylva_compile.blocks.masks import BlockMask, Masks, base_fingerprint, check_block_fits, check_block_size
from sylva_compile.blocks.scope import Scope, input_axes, unwrap, weights_in_scope
from sylva_compile.curvature.baselines import magnitude_scores, random_scores
from sylva_compile.curvature.estimators import EstimatorChoice, Estimators
from sylva_compile.curvature.kfac import Score
from sylva_compile.errors import ArgumentError, EmbedError, TraceError
from sylva_compile.kernels.blocks import grid_shape
from sylva_compile.tracing.batches import LossFn
from sylva_compile.tracing.checkpoint import TraceCheckpoint
from sylva_compile.tracing.memory import TraceEstimate, check_fits, estimate_bytes
from sylva_compile.tracing.observation import TraceProgress, observe, observed
from sylva_compile.tracing.selection import Allocation, Budget, ChooseBlocks, select_blocks
from sylva_compile.version import __version__

Method = Literal["sylva", "kfac", "fisher", "magnitude", "random"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

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
    score: Score = "greedy",
    allocation: Allocation = "layer",
    column_budget: float | None = None,
    damping: float | None = None,
    loss_fn: LossFn | None = None,
    process_group: ProcessGroup | None = None,
    progress: bool = True,
    gradient_device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
) -> Masks:
    """ChooseBlocks the blocks of each weight that are worth training.

    The model runs forward and backward over batches of `loader` in evaluation mode (no dropout), compiled by a backend
    that shows every weight gradient's operands to an estimator. It is left as it was found: mode, `requires_grad`,
    gradients, hooks, random state. `estimate` tells what is held in memory meanwhile.

    Args:
        model: the model to fine-tune, in memory, not yet embedded.
        loader: batches; None with "magnitude" and "random". A mapping is called as `model(**batch).loss`.
        scope: "all-linear" (every Linear and Conv1D but the language-model head or, in models of transformers, the
            classifier), a regular expression for the whole module name, or a list of module-name endings; as PEFT's
            `target_modules`.
        sparsity: share of the blocks that stays frozen, in [0, 1); with `allocation="layer"`, of each weight's, and one
            block of each is trained at least.
        block_size: b, at least 8.
        num_partitions: depth K of the hierarchical factors ("sylva"; `score="gain"` does without).
        rank: rank r of their off-diagonal parts.
        num_samples: sequences to trace over all ranks; a loader that ends early is used up, and the log says so.
        method: "sylva", "kfac" (exact dense factors), "fisher" (squared gradients), "magnitude" or "random".
        score: for "sylva" and "kfac": "greedy", blocks chosen one after another, each for what those before it have
            left to win; "gain", what each could win alone, half its Newton decrement; "paper", eqn 19 and 20.
        allocation: "layer" (every weight keeps its share) or "global" (the best blocks of all weights).
        column_budget: at most this fraction of a weight's input block columns holds blocks; None: no limit.
        damping: fraction of a factor's mean diagonal that is added to it; None: 1e-3 for "paper", 0.1 for
            the others.
        loss_fn: `loss_fn(model, batch) -> scalar`, for batches that are no mappings or models without `.loss`.
        process_group: every rank traces its share of the samples, and all end with the same masks.
        progress: show a progress bar.
        gradient_device: where mean gradients, as large as the weights in float32, are kept between batches, such as
            "cpu"; None: beside their weights.
        checkpoint: a file to which the trace is written every `checkpoint_every` batches. Where it exists the trace
            goes on from it, with the same result; the loader must give the same batches again. It is removed at the
            end. With a process group every rank has its own: `.rank0`, `.rank1` and so on are added to the name.
        checkpoint_every: batches between two writes.

    Returns:
        Masks bound to `model`, in the model's order of weights.

    Raises:
        ArgumentError, ScopeError: an argument, or a weight in scope, cannot be used.
        EmbedError: the model carries blocks already.
        TraceError: no batches, no loss, a loss that is not finite or reaches no weight in scope, too little memory, or
            a checkpoint of another trace.
    """
    model = unwrap(model)
    saved: TraceCheckpoint | None = None
    budget = Budget(sparsity, allocation, column_budget)
    _check_choices(method, score, num_partitions, rank, num_samples, damping, checkpoint_every)
    weights, axes = _weights_to_trace(model, scope, block_size)
    if column_budget is not None:
        # A budget without room is refused here, not after the trace.
        grids = {
            name: torch.zeros(grid_shape(weight.shape, block_size), device="cpu") for name, weight in weights.items()
        }
        select_blocks(grids, budget, axes)
    scores: dict[str, Tensor] = {}
    choose: ChooseBlocks | None = None
    if method in _WITHOUT_DATA:
        with torch.random.fork_rng(devices=[]):
            for name, weight in weights.items():
                scores[name] = (magnitude_scores if method == "magnitude" else random_scores)(weight, block_size)
    else:
        if loader is None:
            raise ArgumentError(
                f"method={method!r} needs a loader of batches; give one, or use 'magnitude' or 'random'."
            )
        choice = _choice(method, score, block_size, num_partitions, rank, damping, gradient_device)
        ranks, at = (get_world_size(process_group), get_rank(process_group)) if process_group is not None else (1, 0)
        if num_samples < ranks:
            raise ArgumentError(
                f"num_samples={num_samples} is less than the {ranks} processes; give each one at least."
            )
        share = num_samples // ranks + (at < num_samples % ranks)
        path = checkpoint if checkpoint is None or process_group is None else f"{os.fspath(checkpoint)}.rank{at}"

        def gather() -> tuple[Estimators, TraceCheckpoint | None, TraceProgress]:
            check_fits(estimate_bytes(weights, axes, choice))
            estimators = Estimators(weights, axes, choice)
            run = functools.partial(
                observe, model, weights, estimators, num_samples=share, loss_fn=loss_fn, progress_bar=progress
            )
            if path is None:
                return estimators, None, run(loader)
            saved = TraceCheckpoint(
                path, estimators, _identity(model, weights, choice, ranks, at), every=checkpoint_every
            )
            start = saved.resume()
            return estimators, saved, run(saved.rest_of(loader), start=start, after_batch=saved.after_batch)

        estimators, saved, done = gather() if process_group is None else _on_every_rank(gather, process_group)
        if process_group is not None:
            estimators.combine(process_group)
            done = _of_all_ranks(done, process_group)
        take, choose = (
            (estimators.scores, estimators.take_greedy_map) if choice.is_greedy else (estimators.take_scores, None)
        )
        scores = {name: take(name) for name in observed(weights, done)}
    maps = select_blocks(scores, budget, axes, choose)
    if process_group is not None:
        maps = _agree(maps, process_group)
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
        "versions": {"torch": torch.__version__, "sylva-compile": __version__},
        "base": base_fingerprint(weights[name] for name in blocks),
    }
    masks = Masks(blocks, model=model, config=config)
    _say_if_more_than_asked(masks, sparsity)
    if saved is not None:
        saved.remove()
    return masks


def estimate(
    model: nn.Module,
    *,
    scope: Scope = "all-linear",
    block_size: int = 64,
    num_partitions: int = 4,
    rank: int = 8,
    method: Literal["sylva", "kfac", "fisher"] = "sylva",
    score: Score = "greedy",
    gradient_device: torch.device | str | None = None,
) -> TraceEstimate:
    """What `trace_and_mask` with these arguments will hold in memory beside the model, in bytes; prints as a table.

    Raises:
        ArgumentError, ScopeError: an argument, or a weight in scope, cannot be used.
    """
    weights, axes = _weights_to_trace(unwrap(model), scope, block_size)
    if method in _WITHOUT_DATA:
        raise ArgumentError(f"method={method!r} traces nothing and holds nothing; there is nothing to estimate.")
    _check_choices(method, score, num_partitions, rank)
    choice = _choice(method, score, block_size, num_partitions, rank, None, gradient_device)
    return estimate_bytes(weights, axes, choice)


def _weights_to_trace(
    model: nn.Module, scope: Scope, block_size: int
) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
    """The weights in scope, and of each the axis of its inputs."""
    check_block_size(block_size)
    if embedding.sites(model):
        raise EmbedError(
            "The model carries blocks already; call merge_adapter(model) to keep their values, or save_adapter and "
            "unload_adapter(model) to go back to the base, before tracing."
        )
    weights = weights_in_scope(model, scope)
    check_block_fits(block_size, weights)
    return weights, input_axes(model, weights)


def _choice(
    method: Any,
    score: Score,
    block_size: int,
    depth: int,
    rank: int,
    damping: float | None,
    gradient_device: torch.device | str | None,
) -> EstimatorChoice:
    device = None
    if gradient_device is not None:
        try:
            device = torch.empty(0, device=gradient_device).device
        except (RuntimeError, AssertionError, TypeError):
            device = torch.device("meta")
        if device.type == "meta":
            raise ArgumentError(f"gradient_device={gradient_device!r} cannot be used here; use None or 'cpu'.")
    return EstimatorChoice(method, score, block_size, depth, rank, damping, device)


def _check_choices(
    method: str,
    score: str,
    num_partitions: int,
    rank: int,
    num_samples: int = 1,
    damping: float | None = None,
    checkpoint_every: int = 1,
) -> None:
    if method not in _METHODS:
        raise ArgumentError(f"method={method!r}; use one of {', '.join(_METHODS)}.")
    if score not in get_args(Score):
        raise ArgumentError(f"score={score!r}; use 'greedy', 'gain' or 'paper'.")
    _check_count("num_samples", num_samples, 1)
    _check_count("checkpoint_every", checkpoint_every, 1)
    _check_count("num_partitions", num_partitions, 0)
    _check_count("rank", rank, 0)
    if damping is not None and not (isinstance(damping, Real) and 0 < damping < math.inf):
        raise ArgumentError(f"damping={damping!r}; use None or a fraction above 0.")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}={value!r}; use an integer of {least} or more.")


def _identity(
    model: nn.Module, weights: Mapping[str, Tensor], choice: EstimatorChoice, ranks: int, rank: int
) -> dict[str, Any]:
    """What a checkpoint's statistics depend on: not the damping, the sparsity or the number of samples."""
    # All of the model and not only what is in scope: another head, drawn anew, changes every gradient.
    values = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return {
        "set of weights": sorted(weights),
        "base model": base_fingerprint(value for value in values if value.device.type != "meta"),
        "configuration": _configuration(model),
        "method": choice.method,
        "score": choice.score,
        "block_size": choice.block_size,
        "num_partitions": choice.depth,
        "rank": choice.rank,
        "number of processes": ranks,
        "process": rank,
    }


def _say_if_more_than_asked(masks: Masks, sparsity: float) -> None:
    """Small weights of large blocks train far more than their share, since each trains one block."""
    trained = sum(mask.trainable for mask in masks.values()) / sum(math.prod(mask.shape) for mask in masks.values())
    if trained > 1.5 * (1 - sparsity):
        log.warning(
            "%.1f%% of the elements are trained where sparsity=%g asks for %.1f%%, since every weight trains one "
            "block; use a smaller block_size, or allocation='global'.",
            100 * trained,
            sparsity,
            100 * (1 - sparsity),
        )


def _configuration(model: nn.Module) -> str:
    """What a model of transformers says of itself, such as its number of heads, but for where it came from."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return ""
    said = {key: value for key, value in to_dict().items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _on_every_rank(work: Callable[[], _Result], group: ProcessGroup) -> _Result:
    """What `work` returns. If it fails on any rank of `group`, all raise: none waits for one that is gone."""
    failure: Exception | None = None
    result: list[_Result] = []
    try:
        result.append(work())
    except Exception as error:
        failure = error
    reasons: list[str | None] = [None] * get_world_size(group)
    all_gather_object(reasons, None if failure is None else _first_line(failure), group=group)
    if failure is not None:
        raise failure
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise TraceError(f"Process {rank} of {len(reasons)} could not trace: {reason}")
    return result[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _of_all_ranks(mine: TraceProgress, group: ProcessGroup) -> TraceProgress:
    """What the ranks of `group` have observed together."""
    everyone = [mine] * get_world_size(group)
    all_gather_object(everyone, mine, group=group)
    return TraceProgress(
        batches=sum(one.batches for one in everyone),
        sequences=sum(one.sequences for one in everyone),
        seen=list(dict.fromkeys(name for one in everyone for name in one.seen)),
        missed={name: why for one in everyone for name, why in one.missed.items()},
    )


def _agree(maps: dict[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """The block maps of the first rank of `group`, on every rank."""
    # As an object: maps are on the host, where not every backend can broadcast a tensor.
    shared = [maps]
    broadcast_object_list(shared, src=global_rank(group, 0), group=group)
    return shared[0]
