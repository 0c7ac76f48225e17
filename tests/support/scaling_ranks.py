"""One of several processes that count the bytes of a step's messages: `scaling_ranks.py RANK RANKS DTYPE FILE`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
from two_ranks import process_group

import sylva_compile
from benchmarks.collectives import CollectiveBytes
from benchmarks.model_shapes import Llama
from benchmarks.scaling import COMPUTE, rank_of_lora

SHAPES = Llama(40, 56, 2, heads=4, key_value_heads=2, head_dim=10, vocabulary=81, tied=False)
"""Sizes that neither two nor three processes, nor blocks of 16, divide."""
CONFIG = sylva_compile.SylvaConfig(method="random", sparsity=0.6, block_size=16)


def training(method: str, dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    """Make a model that is ready for training by `method`, and its optimizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPES.hidden,
        intermediate_size=SHAPES.mlp,
        num_hidden_layers=SHAPES.layers,
        num_attention_heads=SHAPES.heads,
        num_key_value_heads=SHAPES.key_value_heads,
        head_dim=SHAPES.head_dim,
        vocab_size=SHAPES.vocabulary,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config).to(dtype)
    if method.startswith("LoRA"):
        lora = peft.LoraConfig(r=rank_of_lora(SHAPES, CONFIG), target_modules="all-linear")
        model = peft.get_peft_model(model, lora)
    masks = None
    if method.startswith("blocks"):
        model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(model, config=CONFIG)
        if "after" not in method:
            masks.embed()
    if method.endswith("FSDP2"):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if masks is not None:
        masks.embed()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = sylva_compile.AdamW(trained, lr=1e-3)
    return (DistributedDataParallel(model) if "DDP" in method else model), optimizer


def counted(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, int]]]:
    for method in COMPUTE:
        model, optimizer = training(method, dtype)
        ids = torch.randint(0, SHAPES.vocabulary, (2, 8))
        for _ in range(3):
            # The third step: DistributedDataParallel makes its buckets anew before the second.
            with CollectiveBytes() as found:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        # DistributedDataParallel broadcasts buffers, here a few constants.
        yield method, {kind: count for kind, count in found.bytes.items() if kind != "broadcast"}


if __name__ == "__main__":
    number, ranks, kind, file = sys.argv[1:]
    with process_group(int(number), f"{file}.store", int(ranks)):
        results = dict(counted(getattr(torch, kind)))
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(results))
