"""Block scores, kept apart from the choice of blocks: one trace serves every sparsity, pattern and learning rate."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Batch
from sylva_compile.blocks.scope import input_axes, weights_in_scope
from sylva_compile.curvature.baselines import magnitude_scores, random_scores
from sylva_compile.curvature.estimators import EstimatorChoice, Estimators
from sylva_compile.kernels.blocks import grid_shape
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.selection import Budget, ChooseBlocks, select_blocks

Pattern = Literal["blocks", "columns", "rectangle"]
PATTERNS = ("blocks", "columns", "rectangle")


@dataclass(frozen=True)
class Scores:
    """Scores of every block of every weight in scope, and what they cost.

    Attributes:
        by_weight: weight name to `[ceil(m/b), ceil(n/b)]`; higher is better.
        axes: weight name to the axis that the inputs meet.
        seconds: of the trace.
        peak_bytes: that the trace held at one time beside the model, where somebody measured them.
        jointly: what chooses blocks of a weight together, for scores that do.
        chosen: choices that were made before, and the seconds that each took.
    """

    by_weight: dict[str, Tensor]
    axes: dict[str, int]
    seconds: float
    peak_bytes: int = 0
    jointly: ChooseBlocks | None = None
    chosen: dict[tuple[Budget, Pattern], tuple[dict[str, Tensor], float]] = field(default_factory=dict)


def block_scores(
    model: nn.Module, batches: Iterable[Batch], *, scope: str, block_size: int, samples: int, seed: int, **how: Any
) -> Scores:
    """What `trace_and_mask` scores blocks with before it chooses.

    Args:
        model: untouched afterwards.
        batches: to trace.
        scope: as for `trace_and_mask`.
        block_size: b.
        samples: sentences of `batches` to look at.
        seed: for random scores.
        how: `method`, and for those that look at data `score`, `damping`, `num_partitions`, `rank`.
    """
    started = time.perf_counter()
    weights = weights_in_scope(model, scope)
    axes = input_axes(model, weights)
    method, jointly = how["method"], None
    if method == "magnitude":
        found = {name: magnitude_scores(weight, block_size) for name, weight in weights.items()}
    elif method == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = {name: random_scores(weight, block_size) for name, weight in weights.items()}
    else:
        choice = EstimatorChoice(
            method, how["score"], block_size, how["num_partitions"], how["rank"], how.get("damping")
        )
        estimators = Estimators(weights, axes, choice)
        done = observe(model, weights, estimators, batches, num_samples=samples)
        found = {name: estimators.scores(name) for name in weights if name in done.seen}
        jointly = estimators.greedy_map if choice.is_greedy else None
    return Scores(found, axes, time.perf_counter() - started, jointly=jointly)


def choose_once(scores: Scores, budget: Budget, pattern: Pattern) -> tuple[dict[str, Tensor], float]:
    """What `choose` says and the seconds that it took; runs that differ in learning rate share them."""
    if (budget, pattern) not in scores.chosen:
        started = time.perf_counter()
        maps = choose(scores, budget, pattern)
        scores.chosen[budget, pattern] = maps, time.perf_counter() - started
    return scores.chosen[budget, pattern]


def choose(scores: Scores, budget: Budget, pattern: Pattern = "blocks") -> dict[str, Tensor]:
    """Block maps by weight name: single blocks, whole block columns, or a rectangle of rows and columns a weight.

    Columns and rectangles come in large pieces; what one weight has too little or too much, the next one makes up for.
    """
    if pattern == "blocks":
        return select_blocks(scores.by_weight, budget, scores.axes, scores.jointly)
    maps: dict[str, Tensor] = {}
    owed = 0
    for name, score in scores.by_weight.items():
        # Outputs by inputs, whatever way the weight is stored.
        values = score if scores.axes[name] == 1 else score.t()
        owed += budget.blocks(score.numel())
        chosen = _columns(values, owed) if pattern == "columns" else _rectangle(values, owed)
        owed -= int(chosen.sum())
        maps[name] = chosen if scores.axes[name] == 1 else chosen.t()
    return maps


def _columns(scores: Tensor, wanted: int) -> Tensor:
    """The best whole columns (as PaCA trains them), the number of blocks as near to `wanted` as columns allow."""
    rows, columns = scores.shape
    count = min(columns, max(1, round(wanted / rows)))
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    chosen[:, scores.sum(0).topk(count).indices] = True
    return chosen


def _rectangle(scores: Tensor, wanted: int) -> Tensor:
    """The best rows by the best columns (as LoSiA trains them), in about the weight's own proportions.

    For scores that are an outer product, such as the paper's, no rectangle of this shape has a higher sum.
    """
    rows, columns = scores.shape
    height = min(rows, max(1, round((max(1, wanted) * rows / columns) ** 0.5)))
    width = min(columns, max(1, round(wanted / height)))
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    best_rows = scores.sum(1).topk(height).indices
    chosen[best_rows[:, None], scores.sum(0).topk(width).indices[None, :]] = True
    return chosen


def budget_elements(weights: Mapping[str, Tensor], sparsity: float, block_size: int) -> int:
    """Trainable elements of all weights at a sparsity, as near as whole blocks come."""
    budget, total = Budget(sparsity), 0.0
    for weight in weights.values():
        rows, columns = grid_shape(weight.shape, block_size)
        total += weight.numel() * budget.blocks(rows * columns) / (rows * columns)
    return round(total)
