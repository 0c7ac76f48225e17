"""What blocks in experts cannot follow is refused in words, and the model stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_experts import VOCABULARY, experts_of, tiny_mixture
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sylva_compile
from sylva_compile import Masks
from sylva_compile.errors import ArgumentError, EmbedError, ScopeError
from sylva_compile.kernels.blocks import as_matrix, grid_shape
from sylva_compile.schedules import MovingBlocks

B = 8
IMPLEMENTATIONS = ["eager", "batched_mm", "deepgemm", "sonicmoe"]


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (2, 12))
    return [{"input_ids": ids, "labels": ids}]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that embedding or a trace could change."""
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    # An empty note of the tensors that adapters have replaced changes nothing.
    modules = [(type(m), m.training, sorted(m.__dict__.keys() - {"_sylva_replaced"})) for m in model.modules()]
    return parameters, modules


def assert_same(model: nn.Module, before: tuple[Any, ...]) -> None:
    parameters, modules = snapshot(model)
    assert modules == before[1] and parameters.keys() == before[0].keys()
    for name, (which, flag, value) in parameters.items():
        assert (which, flag) == before[0][name][:2], name
        assert torch.equal(value, before[0][name][2]), name


def set_implementation(model: nn.Module, implementation: str) -> None:
    # deepgemm and sonicmoe need packages and GPUs before transformers takes them.
    for module in experts_of(model).values():
        module.config._experts_implementation = implementation


def everywhere(model: nn.Module) -> Masks:
    maps = {
        name: torch.ones(*grid_shape(as_matrix(p).shape, B), dtype=torch.bool)
        for name, p in model.named_parameters()
        if p.dim() == 3
    }
    return Masks.from_block_maps(model, maps, B)


def traced(model: nn.Module, **options: Any) -> Masks:
    settings = {"block_size": B, "num_samples": 2, "progress": False, "sparsity": 0.9} | options
    return sylva_compile.trace_and_mask(model, batches(), **settings)


ENTRANCES: dict[str, Callable[[nn.Module], object]] = {
    "a trace": traced,
    "random blocks": lambda model: traced(model, method="random"),
    "estimate": lambda model: sylva_compile.estimate(model, block_size=B),
    "masks by hand": lambda model: everywhere(model).embed(),
}


class TestImplementations:
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_refused(self, implementation: str, entrance: str) -> None:
        model = tiny_mixture("qwen3-moe")
        set_implementation(model, implementation)
        before = snapshot(model)
        with pytest.raises(ScopeError, match=f"run as '{implementation}'") as caught:
            ENTRANCES[entrance](model)
        assert "set_experts_implementation('grouped_mm')" in str(caught.value) and "\n" not in str(caught.value)
        assert_same(model, before)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_an_adapter_is_refused(self, implementation: str, tmp_path: Path) -> None:
        trained, model = tiny_mixture("qwen3-moe"), tiny_mixture("qwen3-moe")
        model.load_state_dict(trained.state_dict())
        everywhere(trained.requires_grad_(False)).embed()
        sylva_compile.save_adapter(trained, tmp_path / "adapter")
        set_implementation(model, implementation)
        before = snapshot(model)
        with pytest.raises(ScopeError, match=f"run as '{implementation}'"):
            sylva_compile.load_adapter(model, tmp_path / "adapter")
        assert_same(model, before)


class TestColumnBudget:
    """Experts that are stored inputs by outputs have no columns of inputs in common."""

    @pytest.mark.parametrize("architecture", ["gpt-oss", "llama4"])
    @pytest.mark.parametrize("method", ["sylva", "fisher", "random", "magnitude"])
    def test_a_choice_is_refused(self, architecture: str, method: Any) -> None:
        model = tiny_mixture(architecture)
        before = snapshot(model)
        with pytest.raises(ArgumentError, match="stores its experts transposed"):
            traced(model, method=method, column_budget=0.5)
        assert_same(model, before)

    @pytest.mark.parametrize("architecture", ["gpt-oss", "llama4"])
    def test_moves_are_refused(self, architecture: str) -> None:
        model = tiny_mixture(architecture).requires_grad_(False)
        masks = traced(model, method="random", scope=["experts"])
        masks.embed()
        places = {name: mask.positions for name, mask in masks.items()}
        before = snapshot(model)
        with pytest.raises(ArgumentError, match="stores its experts transposed"):
            MovingBlocks(masks, column_budget=0.5)
        assert_same(model, before)
        assert all(torch.equal(masks[name].positions, where) for name, where in places.items())


class TestFullyShard:
    @pytest.fixture(autouse=True)
    def _one_process(self, tmp_path: Path) -> Any:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_experts_that_are_split_are_refused(self, entrance: str) -> None:
        model = tiny_mixture("mixtral")
        fully_shard(model.model.layers[0])
        before = [(type(module), sorted(module._parameters)) for module in model.modules()]
        with pytest.raises(ScopeError, match="experts that fully_shard splits") as caught:
            ENTRANCES[entrance](model)
        assert "\n" not in str(caught.value)
        assert [(type(module), sorted(module._parameters)) for module in model.modules()] == before

    @pytest.mark.parametrize("entrance", ["a trace", "estimate"])
    def test_a_trace_of_experts_beside_weights_that_are_split_is_refused(self, entrance: str) -> None:
        model = tiny_mixture("mixtral")
        fully_shard(model.model.layers[0].self_attn)
        before = [(type(module), sorted(module._parameters)) for module in model.modules()]
        with pytest.raises(ScopeError, match="beside weights that fully_shard splits"):
            ENTRANCES[entrance](model)
        assert [(type(module), sorted(module._parameters)) for module in model.modules()] == before

    def test_experts_with_blocks_are_refused(self) -> None:
        model = tiny_mixture("mixtral").requires_grad_(False)
        masks = everywhere(model)
        masks.embed()
        (experts,) = experts_of(model).values()
        before = snapshot(experts)
        with pytest.raises(EmbedError, match="fully_shard cannot split"):
            fully_shard(model.model.layers[0])
        assert_same(experts, before)
