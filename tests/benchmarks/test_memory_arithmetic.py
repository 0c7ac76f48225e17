"""The arithmetic of memory is that of real models."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sylva_compile
from benchmarks import memory_arithmetic
from benchmarks.memory_arithmetic import STATES, count, trace, trainable
from benchmarks.model_shapes import MODELS, Llama, Qwen3Moe
from sylva_compile.blocks.embed import block_states
from sylva_compile.optim import Muon
from sylva_compile.schedules import MovingBlocks

SMALL = Llama(hidden=64, mlp=96, layers=2, heads=4, key_value_heads=2, head_dim=16, vocabulary=80, tied=False)
MIXTURE = Qwen3Moe(**vars(SMALL), experts=4)
CONFIG = sylva_compile.SylvaConfig(method="random", sparsity=0.8, block_size=16)


def real(shapes: Llama) -> nn.Module:
    sizes = {
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.mlp,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.key_value_heads,
        "head_dim": shapes.head_dim,
        "vocab_size": shapes.vocabulary,
        "tie_word_embeddings": shapes.tied,
    }
    model: nn.Module
    if isinstance(shapes, Qwen3Moe):
        experts = {"moe_intermediate_size": shapes.mlp, "num_experts": shapes.experts}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.to(torch.bfloat16).requires_grad_(False)


def nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_shapes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    assert MODELS[name].parameters() == parameters
    with torch.device("meta"):
        model = real(MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("shapes", [SMALL, replace(SMALL, tied=True), MIXTURE], ids=["untied", "tied", "mixture"])
def test_counts_are_those_of_a_real_model(shapes: Llama) -> None:
    model = real(shapes)
    found = count(shapes, CONFIG, STATES["AdamW"])
    assert found.weights == nbytes(list(model.parameters()))
    layers = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert shapes.linear() == sum(weight.numel() for weight in layers)
    masks = sylva_compile.trace_and_mask(model, config=CONFIG)
    masks.embed(model)
    assert trainable(shapes, CONFIG) == sum(blocks.numel() for blocks in masks.parameters())
    assert found.blocks == nbytes(masks.parameters())
    values = [state.originals.values for state in block_states(model).values()]
    assert found.originals == nbytes(values)


@pytest.mark.parametrize(
    ("optimizer", "options"), [("AdamW", {}), ("Muon", {"momentum": 0.8}), ("Muon without momentum", {"momentum": 0})]
)
def test_states_are_those_of_the_optimizer(optimizer: str, options: dict[str, float]) -> None:
    model = real(SMALL)
    masks = sylva_compile.trace_and_mask(model, config=CONFIG)
    masks.embed(model)
    kind = sylva_compile.AdamW if optimizer == "AdamW" else Muon
    made = kind(masks.parameters(), lr=0.01, **options)
    for blocks in masks.parameters():
        blocks.grad = torch.ones_like(blocks)
    made.step()
    states = [value for state in made.state.values() for name, value in state.items() if name not in ("step", "born")]
    assert nbytes(states) == count(SMALL, CONFIG, STATES[optimizer]).states
    assert nbytes([blocks.grad for blocks in masks.parameters()]) == count(SMALL, CONFIG, 0).gradients


def test_originals_of_blocks_that_were_everywhere() -> None:
    model = real(SMALL)
    masks = sylva_compile.trace_and_mask(model, config=CONFIG)
    masks.embed(model)
    schedule = MovingBlocks(masks, every=1, choose="cycle")
    for _ in range(8):
        schedule.step()
    values = [state.originals.values for state in block_states(model).values()]
    assert nbytes(values) == count(SMALL, CONFIG, 0).originals_moving


@pytest.mark.parametrize("shapes", [SMALL, MIXTURE], ids=["dense", "mixture"])
def test_a_trace_is_what_estimate_says(shapes: Llama) -> None:
    config = sylva_compile.SylvaConfig(block_size=16)
    said, ours = sylva_compile.estimate(real(shapes), config), trace(shapes, config)
    assert {name: weight.memory for name, weight in ours.weights.items()} == {
        name: weight.memory for name, weight in said.weights.items()
    }


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    memory_arithmetic.main([])
    printed = capsys.readouterr().out
    assert printed.count("| Llama-3-8B |") == 12
