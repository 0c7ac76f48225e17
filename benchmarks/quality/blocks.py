"""Trainable blocks inside frozen weights: those that stay, those that move, and layers that are drawn."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

import sylva_compile
from benchmarks.quality import optimizers
from benchmarks.quality.ready import Budgeted, Ready, Traced, head_alone
from benchmarks.quality.tasks import Batch, heads_of
from benchmarks.quality.traces import PATTERNS, choose_once
from sylva_compile.blocks.moving import Carry
from sylva_compile.config import Allocation, Score, SylvaConfig
from sylva_compile.config import Method as TraceMethod
from sylva_compile.schedules import LayerSchedule, MovingBlocks
from sylva_compile.schedules.moving import Choose

_OF_MOVES = ("every", "choose", "temperature", "column_budget", "carry")

OPTIONS = frozenset({"trace", "score", "damping", "pattern", "allocation", "prune", "sparsity", *_OF_MOVES})
"""The options of blocks, beside those of optimizers and of layers that are drawn."""


def prepare(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare trainable blocks inside frozen weights, which move where the options have `every`.

    With `prune`, the rest of those weights is set to zero.
    """
    scores = traced(options)
    config = SylvaConfig(
        sparsity=budget.sparsity,
        allocation=options.get("allocation", "layer"),
        column_budget=options.get("column_budget"),
    )
    maps, seconds = choose_once(scores, config, options.get("pattern", "blocks"))
    masks = sylva_compile.Masks.from_block_maps(model, maps, budget.block_size)
    if options.get("prune", False):
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask.dense())
    head_alone(model)
    masks.embed(model)
    moving = {name: options[name] for name in _OF_MOVES if name in options}
    schedules: list[MovingBlocks | LayerSchedule] = []
    if "every" in options:
        schedules.append(MovingBlocks(masks, seed=seed, **moving))

    def begin(batches: Sequence[Batch]) -> None:
        # It leaves most blocks without a gradient, so an optimizer that is made afterwards would not see them.
        if policy := options.get("policy"):
            schedules.append(LayerSchedule(masks, policy, options["fraction"], seed=seed, batches=batches))

    def after_step() -> None:
        for schedule in schedules:
            schedule.step()

    return Ready(
        model,
        masks.parameters(),
        lambda: _adapter_bytes(model),
        optimizers.for_blocks(options),
        trace_seconds=scores.seconds + seconds,
        trace_bytes=scores.peak_bytes,
        masks=masks,
        begin=begin,
        after_step=after_step,
    )


def check(options: Mapping[str, Any]) -> str | None:
    """Return the error message for the options of blocks, or None if they are valid."""
    allowed = {
        "trace": get_args(TraceMethod),
        "score": get_args(Score),
        "pattern": PATTERNS,
        "allocation": get_args(Allocation),
        "choose": get_args(Choose),
        "carry": get_args(Carry),
    }
    if "every" not in options and (strange := {"choose", "temperature", "carry"} & options.keys()):
        return f"{min(strange)} is of blocks that move; give every, the number of steps between moves, too"
    if "trace" not in options:
        return f"no trace; use one of {allowed['trace']}"
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            return f"{name}={options[name]!r}; use one of {values}"
    return None


def _adapter_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        sylva_compile.save_adapter(model, folder, modules_to_save=heads_of(model))
        return sum(path.stat().st_size for path in Path(folder).iterdir())
