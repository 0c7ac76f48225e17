"""One of two processes that trace experts together: `python trace_experts_two_ranks.py RANK DIRECTORY`.

The batches of each process leave out an expert that those of the other one reach; nobody reaches the last one.
"""

import sys
from typing import Any

import torch
from tiny_experts import Routed, experts_of, tiny_mixture
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks

METHODS: list[dict[str, Any]] = [
    {"score": "greedy", "num_partitions": 1},
    {"score": "greedy", "num_partitions": 1, "expert_budget": "expert"},
    {"score": "gain"},
    {"score": "paper", "num_partitions": 1},
    {"method": "kfac"},
    {"method": "fisher"},
]
Batch = tuple[Tensor, Tensor, Tensor]


def model_and_data() -> tuple[nn.Module, list[Batch]]:
    """Make the experts of one layer, and batches whose tokens go to experts 0 and 1, then 1 and 2, and so on."""
    torch.manual_seed(0)
    (experts,) = experts_of(tiny_mixture("mixtral")).values()
    chosen = [torch.stack([torch.randperm(2) + at % 2 for _ in range(20)]) for at in range(4)]
    return Routed(experts).double(), [(torch.randn(20, 32), each, torch.randn(20, 32)) for each in chosen]


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    x, chosen, weigh = batch
    return (model(x.double(), chosen, torch.ones(chosen.shape, dtype=torch.float64)) * weigh).sum()


def traced(model: nn.Module, data: list[Batch], options: dict[str, Any], group: ProcessGroup | None = None) -> Masks:
    settings = {"block_size": 8, "sparsity": 0.7, "rank": 48, "num_samples": 80, "scope": ["experts"]} | options
    return sylva_compile.trace_and_mask(model, data, loss_fn=weighted, process_group=group, progress=False, **settings)


def main(rank: int, directory: str, group: ProcessGroup) -> None:
    model, data = model_and_data()
    for at, options in enumerate(METHODS):
        traced(model, data[rank::2], options, group).save(f"{directory}/{at}-{rank}")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[2]}/store") as world:
        main(int(sys.argv[1]), sys.argv[2], world)
