"""The work of each of two processes in the test of combined estimators, in a module that a spawned process imports."""

from typing import Any

import torch
from specs import specs_of
from torch import Tensor
from two_ranks import process_group

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature import update_queue
from sylva_compile.curvature.estimators import Estimators

F64 = torch.float64


def batch_of(tokens: int, m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, dtype=F64, generator=generator) + 0.5
    gy = torch.randn(tokens, m, dtype=F64, generator=generator)
    gy[::3] = 0
    return x, gy


def estimators(
    names: str, m: int, n: int, method: Any, score: Any, *, depth: int = 2, rank: int = 64, dtype: torch.dtype = F64
) -> Estimators:
    weights = {name: torch.empty(m, n, dtype=dtype) for name in names}
    config = SylvaConfig(method=method, score=score, block_size=8, num_partitions=depth, rank=rank)
    return Estimators(specs_of(weights), config)


def combine(rank: int, method: str, score: str, group_bytes: int, store: str, results: str) -> None:
    """Update estimators on this rank, combine them with the other rank's, and save the scores."""
    update_queue.GROUP_BYTES_ON_CPU = group_bytes
    with process_group(rank, store) as group:
        one = estimators("qkei", 10, 12, method, score, depth=1, rank=12)
        x, gy = batch_of(40, 10, 12, rank)
        for name in "qk":
            # Rank 1 gets a new tensor for each weight, so that the ranks disagree about which weights share one.
            one.update(name, x if rank == 0 else x.clone(), gy)
        if rank == 1:
            # "e" is an expert that gets no token of rank 0; "i" is updated on no rank.
            one.update("e", x, gy)
        one.end_batch()
        one.combine(group)
        torch.save({name: one.take_scores(name) for name in "qke"}, f"{results}/{rank}.pt")
