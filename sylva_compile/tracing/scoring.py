"""Scores of all blocks of the traced weights: from a trace of the model, or from the weights alone."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sylva_compile.blocks.fingerprint import base_fingerprint
from sylva_compile.blocks.quantised_base import dense_values
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.baselines import SCORES_WITHOUT_DATA
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.tracing.batches import LossFn
from sylva_compile.tracing.checkpoint import TraceCheckpoint
from sylva_compile.tracing.memory import check_fits, estimate_bytes
from sylva_compile.tracing.observation import observe, observed
from sylva_compile.tracing.progress import TraceProgress
from sylva_compile.tracing.quantised_probes import quantised_probes
from sylva_compile.tracing.ranks import on_every_rank, progress_of_all_ranks, rank_and_size, share_of_samples
from sylva_compile.tracing.selection import ChooseBlocks
from sylva_compile.tracing.together import observe_together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The scores of a trace.

    Attributes:
        scores: weight name to scores `[ceil(m/b), ceil(n/b)]` of its blocks, as the weight is stored; those of a trace
            are not all zero.
        choose: chooses the blocks of a weight, for scores that depend on the blocks chosen before; None: the highest
            scores are taken.
        checkpoint: the file that the trace has written, if any.
    """

    scores: dict[str, Tensor]
    choose: ChooseBlocks | None = None
    checkpoint: TraceCheckpoint | None = None

    def finish(self) -> None:
        """Remove the checkpoint: the masks have taken its place."""
        if self.checkpoint is not None:
            self.checkpoint.remove()


def score_without_data(model: nn.Module, weights: Mapping[str, nn.Parameter], config: SylvaConfig) -> Scored:
    """Score blocks by the weights alone; torch's random state is as before afterwards."""
    score = SCORES_WITHOUT_DATA[config.method]
    with torch.random.fork_rng(devices=[]):
        return Scored({name: score(dense_values(model, weight), config) for name, weight in weights.items()})


def score_by_tracing(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    specs: Mapping[str, WeightSpec],
    loader: Iterable[Any] | None,
    config: SylvaConfig,
    *,
    loss_fn: LossFn | None = None,
    group: ProcessGroup | None = None,
    split_over: ProcessGroup | None = None,
) -> Scored:
    """Score blocks by the curvature that estimators gather while `model` runs over `loader`; see `trace_and_mask`.

    `split_over` are the processes over which the model is split, if any; they are those of `group`.
    """
    if loader is None:
        raise ArgumentError(
            f"method={config.method!r} needs a loader of batches; give one, or use 'magnitude', 'lift' or 'random'."
        )
    if isinstance(loader, Mapping):
        raise ArgumentError(f"The loader is a {type(loader).__name__}; give an iterable of batches, such as [batch].")
    if torch.is_inference_mode_enabled():
        raise TraceError("A trace needs gradients, and torch.inference_mode() gives none; trace outside of it.")
    share = share_of_samples(config.num_samples, group)

    if split_over is not None and config.checkpoint is not None:
        raise ArgumentError("checkpoint= does not work for a model that fully_shard has split; leave it out.")

    def prepare() -> Estimators:
        check_fits(estimate_bytes(specs, config, split_over=split_over))
        return Estimators(specs, config, split_over=split_over)

    def trace() -> tuple[Estimators, TraceCheckpoint | None, TraceProgress]:
        with quantised_probes(model, weights) as leaves:
            return trace_through(leaves)

    def trace_through(leaves: Mapping[str, nn.Parameter]) -> tuple[Estimators, TraceCheckpoint | None, TraceProgress]:
        estimators = prepare()
        run = functools.partial(
            observe, model, leaves, estimators, num_samples=share, loss_fn=loss_fn, progress_bar=config.progress
        )
        if config.checkpoint is None:
            return estimators, None, run(loader)
        rank, _ = rank_and_size(group)
        path = config.checkpoint if group is None else f"{config.checkpoint}.rank{rank}"
        identity = _identity(model, weights, config, group)
        checkpoint = TraceCheckpoint(path, estimators, identity, every=config.checkpoint_every)
        start = checkpoint.resume()
        done = run(checkpoint.rest_of(loader), start=start, after_batch=checkpoint.after_batch)
        return estimators, checkpoint, done

    if split_over is None:
        estimators, checkpoint, done = on_every_rank(trace, group)
    else:
        estimators, checkpoint = on_every_rank(prepare, split_over), None
        done = observe_together(
            model,
            weights,
            estimators,
            loader,
            split_over,
            num_samples=share,
            loss_fn=loss_fn,
            progress_bar=config.progress,
        )
    if group is not None:
        estimators.combine(group)
    names = observed(weights, progress_of_all_ranks(done, group))
    if config.is_greedy:
        scores = {name: estimators.scores(name) for name in names}
        return Scored(_without_zeros(scores), estimators.take_greedy_map, checkpoint)
    return Scored(_without_zeros({name: estimators.take_scores(name) for name in names}), None, checkpoint)


def _without_zeros(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of `scores` that are not all zero, since equal scores choose nothing; the log names the others."""
    found = {name: score for name, score in scores.items() if bool(score.any())}
    for name in scores:
        if name not in found:
            log.warning("%s gets no mask: its gradient is zero in every batch, and so are its scores.", name)
    return found


def _identity(
    model: nn.Module, weights: Mapping[str, Tensor], config: SylvaConfig, group: ProcessGroup | None
) -> dict[str, Any]:
    """Return everything that a checkpoint's statistics depend on: not damping, sparsity or the number of samples."""
    rank, size = rank_and_size(group)
    # All of the model and not only the weights in scope: another head, drawn anew, changes every gradient.
    values = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return {
        "set of weights": sorted(weights),
        "base model": base_fingerprint(value for value in values if value.device.type != "meta"),
        "configuration": _model_configuration(model),
        "method": config.method,
        "score": config.score,
        "block_size": config.block_size,
        "num_partitions": config.num_partitions,
        "rank": config.rank,
        "number of processes": size,
        "process": rank,
    }


def _model_configuration(model: nn.Module) -> str:
    """Return a digest of the configuration of a model of transformers, without its path."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return ""
    values = {key: value for key, value in to_dict().items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
