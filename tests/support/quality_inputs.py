"""A batch, a budget and random block scores, which tests of the quality harness prepare methods with."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality import grid
from benchmarks.quality.grid import Settings
from benchmarks.quality.ready import Budgeted
from benchmarks.quality.traces import Scores, block_scores
from sylva_compile.config import SylvaConfig

GRIDS = Path(grid.__file__).parent / "grids"
SCOPE = Settings().scope
BUDGET = Budgeted(SCOPE, 0.7, 8)
CHANCE = {"kind": "blocks", "trace": "random"}


def batch() -> dict[str, Tensor]:
    """Return 8 sentences of 6 random tokens and their labels."""
    ids = torch.randint(5, 500, (8, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2}


def chance_scores(model: nn.Module) -> Scores:
    """Return random scores of the blocks of `model` in `SCOPE`."""
    return block_scores(model, [], SylvaConfig(scope=SCOPE, block_size=8, method="random"), seed=0)
