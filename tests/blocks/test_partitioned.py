"""Weights that are split over processes are refused by name, before anything changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import EmbedError, ScopeError

STYLES = pytest.mark.parametrize("style", [ColwiseParallel(), RowwiseParallel()], ids=["by rows", "by columns"])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """Yield a mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model_and_masks() -> tuple[nn.Module, Masks]:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    return model, sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=8)


def refusals(model: nn.Module, masks: Masks, match: str) -> None:
    """Check that a trace, masks by hand, and embedding all refuse `model`."""
    with pytest.raises(ScopeError, match=match):
        sylva_compile.trace_and_mask(model, method="random", block_size=8)
    with pytest.raises(ScopeError, match=match):
        Masks.from_block_maps(model, {"0.weight": torch.ones(2, 2, dtype=torch.bool)}, 8)
    with pytest.raises(ScopeError, match=match):
        Masks(dict(masks)).embed(model)
    assert not block_states(model)


class TestTensorParallelism:
    def test_weights_that_are_split_by_columns(self, mesh: DeviceMesh) -> None:
        model, masks = model_and_masks()
        parallelize_module(model, mesh, {"0": RowwiseParallel()})
        refusals(model, masks, r"is split over processes as \(Shard\(dim=1\),\).*parallelize_module.*out of scope")

    def test_weights_that_are_split_by_rows(self, mesh: DeviceMesh) -> None:
        model, masks = model_and_masks()
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        refusals(model, masks, "parallelize_plan")

    @STYLES
    @pytest.mark.parametrize("grad", [True, False])
    def test_of_a_module_with_blocks(self, mesh: DeviceMesh, style: ParallelStyle, grad: bool) -> None:
        model, masks = model_and_masks()
        masks.embed()
        before = dict(model.named_parameters())
        with pytest.raises(EmbedError, match="tensor parallelism"), torch.set_grad_enabled(grad):
            parallelize_module(model, mesh, {"0": style})
        assert all(value is before[name] for name, value in model.named_parameters())
        model(torch.randn(2, 16)).sum().backward()

    def test_beside_blocks(self, mesh: DeviceMesh) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
        masks = sylva_compile.trace_and_mask(model, scope=["0"], method="random", sparsity=0.5, block_size=8)
        masks.embed()
        parallelize_module(model, mesh, {"1": ColwiseParallel()})
        model(torch.randn(2, 16)).sum().backward()
        assert all(blocks.grad is not None for blocks in masks.parameters())


class TestDeepSpeed:
    def test_zero_3(self) -> None:
        model, masks = model_and_masks()
        weight = model.get_parameter("0.weight")
        # What deepspeed.zero.Init leaves of a parameter.
        weight.data, weight.ds_id, weight.ds_shape = torch.empty(0), 0, (16, 16)  # type: ignore[attr-defined]
        refusals(model, masks, "is partitioned by DeepSpeed's ZeRO-3")

    def test_empty_weights(self) -> None:
        model, masks = model_and_masks()
        model.get_parameter("0.weight").data = torch.empty(0)
        refusals(model, masks, "is empty on this process")
