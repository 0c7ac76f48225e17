"""Tracing a quantised base: the same masks as those of the dequantised one, and an estimate that tells the cost."""

import copy
from typing import Any

import pytest
import torch
from quantised_models import formats, mlp, needs_bitsandbytes, packed_bytes, quiet
from torch import Tensor, nn

import sylva_compile
from sylva_compile.blocks.quantised_base import quantised_base
from sylva_compile.errors import EmbedError

pytestmark = quiet


def loss_fn(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def dense_twin(model: Any) -> nn.Sequential:
    """Return the MLP with dense weights of the same values."""
    layers: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Linear):
            base = quantised_base(model, module.weight)
            assert base is not None
            plain = nn.Linear(module.in_features, module.out_features, dtype=torch.float32)
            plain.weight.data, plain.bias.data = base.dense().clone(), module.bias.detach().clone()
            layers.append(plain)
        else:
            layers.append(copy.deepcopy(module))
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize("kind", formats())
def test_a_trace_finds_the_blocks_of_the_dense_twin(kind: str) -> None:
    torch.manual_seed(0)
    model = mlp(kind, (32, 64, 64, 48))
    twin, packed = dense_twin(model), packed_bytes(model)
    batches = [torch.randn(4, 32) for _ in range(4)]
    options = {"sparsity": 0.7, "block_size": 16, "num_samples": 16, "loss_fn": loss_fn, "progress": False}
    classes, names = [type(module) for module in model], [name for name, _ in model.named_parameters()]
    masks = sylva_compile.trace_and_mask(model, batches, **options)
    assert dict(masks) == dict(sylva_compile.trace_and_mask(twin, batches, **options))
    assert packed_bytes(model) == packed
    assert [type(module) for module in model] == classes
    assert [name for name, _ in model.named_parameters()] == names


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["magnitude", "fisher"])
def test_other_methods(method: Any) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    twin = dense_twin(model)
    batches = [torch.randn(4, 32) for _ in range(2)]
    options = {
        "method": method,
        "sparsity": 0.7,
        "block_size": 16,
        "loss_fn": loss_fn,
        "progress": False,
        "num_samples": 8,
    }
    found = sylva_compile.trace_and_mask(model, batches, **options)
    assert dict(found) == dict(sylva_compile.trace_and_mask(twin, batches, **options))


@needs_bitsandbytes
def test_the_estimate_tells_what_the_mean_gradient_costs() -> None:
    text = str(sylva_compile.estimate(mlp("nf4", (512, 512)), block_size=16))
    assert "The quantised weights take 144.1 KiB, and their mean gradients 1.0 MiB" in text
    assert "gradient_device='cpu'" in text


@needs_bitsandbytes
def test_a_model_with_blocks_is_not_traced() -> None:
    model = mlp("nf4")
    sylva_compile.trace_and_mask(model, method="random", block_size=16).embed(model)
    with pytest.raises(EmbedError, match="carries blocks already"):
        sylva_compile.trace_and_mask(model, method="random", block_size=16)
