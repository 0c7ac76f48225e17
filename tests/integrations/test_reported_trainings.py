"""Situations in which trainings went wrong, from public reports; compiled code must do what uncompiled code does."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from oracle import assert_invariant, random_masks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sylva_compile
from sylva_compile import Masks
from sylva_compile.errors import EmbedError, MaskError

NAMES = ["first.weight", "second.weight"]


class Net(nn.Module):
    """Two layers and a head; `how` runs the two, under a checkpoint for example."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 40), nn.Linear(40, 24), nn.Linear(24, 8)
        self.dropout = nn.Dropout(dropout)
        self.how: Callable[..., Tensor] | None = None

    def inner(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.second(nn.functional.gelu(self.first(x))))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x) if self.how is None else self.how(self.inner, x))


class Pair:
    """One training twice: uncompiled, and compiled in place."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        plain = Net(dropout).requires_grad_(False)
        self.runs: list[tuple[Any, Masks, torch.optim.Optimizer]] = []
        for model in (plain, copy.deepcopy(plain)):
            torch.manual_seed(1)
            masks = random_masks(model, NAMES, 8, 0.4)
            masks.embed()
            self.runs.append((model, masks, sylva_compile.AdamW(masks.parameters(), lr=0.01)))
        model, masks, _ = self.runs[1]
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))

    def each(self, act: Callable[[Any], Any]) -> None:
        """Do `act` to both models."""
        for model, _, _ in self.runs:
            act(model)

    def step(self, *shape: int, hooks: Callable[[], Any] = contextlib.nullcontext) -> None:
        """Step both on one batch and compare what they have become."""
        x = torch.randn(*shape, 32)
        losses = []
        for model, masks, optimizer in self.runs:
            torch.manual_seed(2)
            with hooks():
                loss = model(x).square().mean()
            loss.backward()
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in masks.parameters())
            optimizer.step()
            optimizer.zero_grad()
            assert_invariant(model, masks)
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        ours, theirs = (dict(model.named_parameters()) for model, _, _ in self.runs)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_before_the_first_step(mode: Callable[[], Any], training: bool) -> None:
    pair = Pair()
    x = torch.randn(4, 32)
    found = []

    def evaluate(model: Any) -> None:
        model.train(training)
        with mode():
            found.append(model(x))
        model.train()

    pair.each(evaluate)
    torch.testing.assert_close(*found)
    for _ in range(2):
        pair.step(4)
        pair.each(evaluate)


def test_unfreezing_after_compiling() -> None:
    pair = Pair()
    pair.step(4)

    def unfreeze(model: Net) -> None:
        model.head.requires_grad_(True)
        model.first.bias.requires_grad_(True)

    pair.each(unfreeze)
    for model, _, optimizer in pair.runs:
        optimizer.add_param_group({"params": [*model.head.parameters(), model.first.bias]})
    before = pair.runs[1][0].head.weight.detach().clone()
    pair.step(4)
    assert not torch.equal(pair.runs[1][0].head.weight, before)
    pair.each(lambda model: model.head.requires_grad_(False))
    pair.step(4)


def test_lengths_and_batch_sizes_that_change() -> None:
    pair = Pair()
    for shape in ((4, 6), (4, 9), (2, 9), (1, 3), (4, 6), (4, 1)):
        pair.step(*shape)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    pair = Pair()

    def checkpointed(model: Net) -> None:
        model.how = lambda run, x: torch.utils.checkpoint.checkpoint(
            run, x.requires_grad_() if reentrant else x, use_reentrant=reentrant
        )

    pair.each(checkpointed)
    for _ in range(2):
        pair.step(4)


@pytest.mark.parametrize("compiled", [0, 1])
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_a_checkpoint_is_the_same_in_both_passes(reentrant: bool, compiled: int) -> None:
    model, masks, _ = Pair(dropout=0.5).runs[compiled]
    twin = copy.deepcopy(model)
    twin.how = lambda run, x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)
    x = torch.randn(16, 32, requires_grad=True)
    gradients = []
    for each in (model, twin):
        torch.manual_seed(5)
        each(x).square().mean().backward()
        gradients.append([each.get_parameter(f"{name}_blocks").grad for name in masks])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_saved_tensors_on_the_cpu() -> None:
    pair = Pair()
    for _ in range(2):
        pair.step(4, hooks=torch.autograd.graph.save_on_cpu)


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tied)).requires_grad_(False)


def test_a_tied_head_with_blocks_is_trained_from_both_ends() -> None:
    ids = torch.randint(0, 64, (2, 8))
    gradients = []
    for compiled in (False, True):
        model = llama(tied=True)
        torch.manual_seed(1)
        masks = random_masks(model, ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"], 8, 0.5)
        masks.embed()
        assert model.model.embed_tokens.weight_blocks is model.lm_head.weight_blocks
        if compiled:
            model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in masks.parameters()])
        torch.optim.SGD(masks.parameters(), lr=0.1).step()
        assert_invariant(model, masks)
        assert model.model.embed_tokens._parameters["weight"] is model.lm_head._parameters["weight"]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_is_resized_beside_blocks(tied: bool) -> None:
    model = llama(tied=tied)
    masks = random_masks(model, ["model.layers.0.mlp.up_proj.weight"], 8, 0.5)
    masks.embed()
    model.resize_token_embeddings(72, mean_resizing=False)
    ids = torch.randint(0, 72, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(masks.parameters(), lr=0.1).step()
    assert_invariant(model, masks)


def test_a_head_with_blocks_is_not_resized_in_silence() -> None:
    model = llama(tied=True)
    random_masks(model, ["lm_head.weight"], 8, 0.5).embed()
    with pytest.raises(EmbedError, match=r"lm_head\.weight carries blocks and takes data of shape \(64, 32\)"):
        model.resize_token_embeddings(72, mean_resizing=False)
    model = llama(tied=False)
    masks = random_masks(model, ["lm_head.weight"], 8, 0.5)
    masks.embed()
    # transformers makes a new head, which has no blocks.
    model.resize_token_embeddings(72, mean_resizing=False)
    with pytest.raises(MaskError, match=r"lm_head\.weight is \(72, 32\) here and \(64, 32\) in these masks"):
        masks.parameters()
