"""Compiling a model's layers in place."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

import sylva_compile
from sylva_compile.compiler import layers
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


def test_the_key_value_cache_costs_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    case = tiny("llama", layers=6)
    case.model.config.use_cache = case.model.generation_config.use_cache = True
    twin = copy.deepcopy(case.model)
    graphs: list[int] = []
    masks = masks_of(case.model)
    inner = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")

    def backend(*args: Any, **kwargs: Any) -> Any:
        graphs.append(1)
        return inner(*args, **kwargs)

    with caplog.at_level("INFO", logger="sylva_compile"):
        sylva_compile.compile_layers(case.model, backend)
    assert "use_cache is off" in caplog.text
    case.model(**case.batch).loss.backward()
    trained = len(graphs)
    prompt = case.batch["input_ids"][:1, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = case.model.generate(input_ids=prompt, **options)
    assert torch.equal(written, twin.generate(input_ids=prompt, **options))
    # One for the first layer, whose input has no gradient, one for the others, and their second traces.
    assert len(graphs) == trained <= 4


def test_a_cache_of_a_model_in_a_wrapper_is_turned_off_too() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Tensor) -> Any:
            return self.inner(**batch)

    case = tiny("llama", layers=3)
    case.model.config.use_cache = True
    model = Wrapper(case.model)
    # Inside of a wrapper nothing tells that the head is one.
    masks = sylva_compile.trace_and_mask(model, method="random", scope=r".*layers.*", block_size=8, sparsity=0.75)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    assert sylva_compile.compile_layers(model, backend) == 3
    model(**case.batch).loss.backward()
    assert backend.report().rewritten == len(masks)


def test_a_cache_in_training_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    layers._warn_of_cache.cache_clear()
    case = tiny("llama")
    backend = sylva_compile.backend(masks_of(case.model), inner="aot_eager")
    sylva_compile.compile_layers(case.model, backend)
    case.model(**case.batch, use_cache=True).loss.backward()
    assert caplog.text.count("runs uncompiled, with dense weight gradients") == 1


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
