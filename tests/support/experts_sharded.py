"""One of two processes that train experts which `fully_shard` leaves out: `python experts_sharded.py RANK DIRECTORY`.

Every process also trains a twin alone, on the joint batch, and compares.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_experts import VOCABULARY, tiny_mixture
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.shards import whole
from sylva_compile.errors import EmbedError


def dense_experts(model: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids).logits.square().mean()
    return loss


def main(rank: int) -> None:
    torch.manual_seed(0)
    model = tiny_mixture("qwen3-moe", layers=2).requires_grad_(False)
    late = copy.deepcopy(model)
    masks = sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.7)
    twin = copy.deepcopy(model)
    masks.embed()
    twins = Masks(dict(masks), model=twin)
    twins.embed()
    for layer in model.model.layers:
        fully_shard(layer, ignored_params=dense_experts(model))
    fully_shard(model, ignored_params=dense_experts(model))
    own, theirs = (sylva_compile.AdamW(each.parameters(), lr=1e-2) for each in (masks, twins))
    for _ in range(2):
        batches = [torch.randint(3, VOCABULARY, (2, 9)) for _ in range(2)]
        loss_of(model, batches[rank]).backward()
        for batch in batches:
            (loss_of(twin, batch) / 2).backward()
        for optimizer in (own, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for name in masks:
        torch.testing.assert_close(whole(model.get_parameter(name)), twin.get_parameter(name).detach())

    fully_shard(late, ignored_params=dense_experts(late))
    with pytest.raises(EmbedError, match="nothing would average the gradients"):
        masks.embed(late)
    print("trained", flush=True)


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), str(Path(sys.argv[2]) / "store")):
        main(int(sys.argv[1]))
        dist.barrier()
