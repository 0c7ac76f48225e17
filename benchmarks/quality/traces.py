"""Block scores, separate from the choice of blocks: one trace serves every sparsity, pattern and learning rate."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks import Batch
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.kernels.blocks import grid_shape
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.scoring import score_without_data
from sylva_compile.tracing.selection import ChooseBlocks, select_blocks
from sylva_compile.tracing.trace import weight_specs

Pattern = Literal["blocks", "columns", "rectangle"]
PATTERNS = ("blocks", "columns", "rectangle")


@dataclass(frozen=True)
class Scores:
    """The scores of every block of every weight in scope, and their cost.

    Attributes:
        by_weight: the scores `[ceil(m/b), ceil(n/b)]` by weight name, transposed if the weight is stored so; higher is
            better.
        specs: the descriptions of the weights, by name.
        seconds: the duration of the trace.
        peak_bytes: the peak bytes of the trace beside the model, or 0 where they were not measured.
        choose: chooses the blocks of a weight; None unless scores depend on the blocks chosen before (greedy).
        chosen: the earlier results of `choose_once`: block maps by weight name, and the seconds that the choice took.
    """

    by_weight: dict[str, Tensor]
    specs: dict[str, WeightSpec]
    seconds: float
    peak_bytes: int = 0
    choose: ChooseBlocks | None = None
    chosen: dict[tuple[SylvaConfig, Pattern], tuple[dict[str, Tensor], float]] = field(default_factory=dict)


def block_scores(model: nn.Module, batches: Iterable[Batch], config: SylvaConfig, *, seed: int) -> Scores:
    """Return block scores, computed as `trace_and_mask` computes them before it chooses blocks.

    Args:
        model: the model to trace; it is left unchanged.
        batches: the batches to trace.
        config: the method, its settings and the number of samples.
        seed: the seed of random scores.
    """
    started = time.perf_counter()
    weights = weights_in_scope(model, config.scope)
    specs = weight_specs(model, weights)
    if not config.needs_data:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scored = score_without_data(model, weights, config)
        return Scores(scored.scores, specs, time.perf_counter() - started)
    estimators = Estimators(specs, config)
    done = observe(model, weights, estimators, batches, num_samples=config.num_samples)
    found = {name: estimators.scores(name) for name in weights if name in done.seen}
    choose = estimators.greedy_map if config.is_greedy else None
    return Scores(found, specs, time.perf_counter() - started, choose=choose)


def choose_once(scores: Scores, config: SylvaConfig, pattern: Pattern) -> tuple[dict[str, Tensor], float]:
    """Return the result of `choose` and the seconds that it took; runs that differ in learning rate share them."""
    if (config, pattern) not in scores.chosen:
        started = time.perf_counter()
        maps = choose(scores, config, pattern)
        scores.chosen[config, pattern] = maps, time.perf_counter() - started
    return scores.chosen[config, pattern]


def choose(scores: Scores, config: SylvaConfig, pattern: Pattern = "blocks") -> dict[str, Tensor]:
    """Return block maps by weight name: single blocks, whole block columns, or one rectangle per weight.

    Columns and rectangles rarely meet a weight's budget exactly; the budget of the next weight makes up the difference.
    """
    if pattern == "blocks":
        return select_blocks(scores.by_weight, config, scores.specs, scores.choose)
    maps: dict[str, Tensor] = {}
    owed = 0
    for name, score in scores.by_weight.items():
        # From here on rows are outputs and columns are inputs, also where the weight is stored transposed.
        values = scores.specs[name].turned(score)
        owed += config.blocks(score.numel())
        chosen = _columns(values, owed) if pattern == "columns" else _rectangle(values, owed)
        owed -= int(chosen.sum())
        maps[name] = scores.specs[name].turned(chosen)
    return maps


def _columns(scores: Tensor, wanted: int) -> Tensor:
    """Return a map of the best whole columns (PaCA trains columns), as near to `wanted` blocks as columns allow."""
    rows, columns = scores.shape
    count = min(columns, max(1, round(wanted / rows)))
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    chosen[:, scores.sum(0).topk(count).indices] = True
    return chosen


def _rectangle(scores: Tensor, wanted: int) -> Tensor:
    """Return a map of the best rows crossed with the best columns (as in LoSiA), in about the weight's proportions.

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
    """Return the number of trainable elements of all weights at `sparsity`, as near as whole blocks come to it."""
    config, total = SylvaConfig(sparsity=sparsity), 0.0
    for weight in weights.values():
        rows, columns = grid_shape(weight.shape, block_size)
        total += weight.numel() * config.blocks(rows * columns) / (rows * columns)
    return round(total)
