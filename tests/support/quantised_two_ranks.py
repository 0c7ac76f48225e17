"""One of two processes that trace and train a quantised model together: `quantised_two_ranks.py RANK DIRECTORY`."""

import sys
from typing import Any

import torch
from quantised_models import mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import process_group

import sylva_compile
from sylva_compile.blocks.embed import block_states
from sylva_compile.optim import AdamW
from sylva_compile.schedules import MovingBlocks

STEPS = 5


def model_and_data() -> tuple[nn.Module, list[Tensor]]:
    """Make a model in NF4 and batches, equal on every rank."""
    torch.manual_seed(0)
    return mlp("nf4", (32, 64, 48)), [torch.randn(8, 32) for _ in range(STEPS)]


def loss_fn(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def train(rank: int, ranks: int) -> dict[str, Any]:
    """Trace, train with moves on this rank's share of each batch, and return what was learnt."""
    model, data = model_and_data()
    # Ranks must agree although they start from different seeds.
    torch.manual_seed(rank)
    settings = {"sparsity": 0.7, "block_size": 16, "num_samples": 32, "progress": False}
    group = torch.distributed.group.WORLD if ranks > 1 else None
    masks = sylva_compile.trace_and_mask(
        model, [batch[rank::ranks] for batch in data], loss_fn=loss_fn, process_group=group, **settings
    )
    masks.embed(model)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    run: Any = torch.compile(DistributedDataParallel(model) if ranks > 1 else model, backend=backend)
    optimizer = AdamW(masks.parameters(), lr=1e-2)
    schedule = MovingBlocks(masks, every=2, seed=3)
    for batch in data:
        loss_fn(run, batch[rank::ranks]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert backend.report().rewritten == len(masks)
    return {
        "places": {name: mask.positions for name, mask in masks.items()},
        "weights": {name: state.trained_dense() for name, state in block_states(model).items()},
    }


if __name__ == "__main__":
    own = int(sys.argv[1])
    with process_group(own, f"{sys.argv[2]}/store"):
        torch.save(train(own, 2), f"{sys.argv[2]}/{own}")
