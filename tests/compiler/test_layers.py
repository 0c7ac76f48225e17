"""Compiling a model's layers in place."""

import copy

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

import sylva_compile
from sylva_compile.errors import EmbedError


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def masks_of(model: nn.Module) -> sylva_compile.Masks:
    return sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.75)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta"])
def test_gradients_are_those_of_the_uncompiled_model(architecture: str) -> None:
    case = tiny(architecture, layers=3)
    masks = masks_of(case.model)
    masks.embed(case.model)
    twin = copy.deepcopy(case.model)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    assert sylva_compile.compile_layers(case.model, backend) == 3
    for model in (case.model, twin):
        model(**case.batch).loss.backward()
    for name in masks:
        torch.testing.assert_close(
            case.model.get_parameter(f"{name}_blocks").grad, twin.get_parameter(f"{name}_blocks").grad
        )
    report = backend.report()
    assert report.rewritten == len(report) == len(masks)


def test_a_model_without_layers_is_compiled_whole() -> None:
    model = Pair()
    masks = masks_of(model)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    assert sylva_compile.compile_layers(model, backend) == 1
    model(torch.randn(3, 16)).sum().backward()
    assert backend.report().rewritten == 2


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(EmbedError, match="carries no blocks"):
        sylva_compile.compile_layers(nn.Linear(16, 16), "sylva")
