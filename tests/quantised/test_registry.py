"""The formats that are known, those that are refused by name, and that no package is imported for them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from quantised_models import formats, mlp, needs_bitsandbytes, needs_torchao, quiet
from torch import nn

import sylva_compile
from benchmarks.memory_arithmetic import nf4_bytes
from sylva_compile.blocks.quantised_base import checksum_of, kind_of, quantised_base
from sylva_compile.blocks.scope import check_weight, weights_in_scope
from sylva_compile.errors import ScopeError
from sylva_compile.quantised.registry import format_of, refused_format, shape_of

pytestmark = quiet


@pytest.mark.parametrize("kind", formats())
def test_a_format_tells_shape_values_and_kind(kind: str) -> None:
    torch.manual_seed(0)
    model = mlp(kind, (32, 64))
    weight = model[0].weight
    base = quantised_base(model, weight)
    assert base is not None
    assert shape_of(weight) == base.shape == tuple(base.dense().shape) == (64, 32)
    assert base.format.refusal(weight) is None
    out = torch.nn.functional.linear(torch.eye(32), base.dense(), model[0].bias)
    assert torch.allclose(out, model.train()(torch.eye(32)), atol=1e-5)
    assert kind_of(model, weight) == base.kind
    assert base.kind.startswith(("bitsandbytes", "torchao"))


@pytest.mark.parametrize("kind", formats())
def test_the_checksum_depends_on_every_packed_tensor(kind: str) -> None:
    torch.manual_seed(0)
    model = mlp(kind, (32, 64))
    seen = {checksum_of(model, model[0].weight)}
    base = quantised_base(model, model[0].weight)
    assert base is not None
    for tensor in base.tensors().values():
        plain = tensor.detach()
        plain.view(-1)[0] = torch.where(plain.view(-1)[0] == 1, 2, 1).to(plain.dtype)
        seen.add(checksum_of(model, model[0].weight))
    assert len(seen) == 1 + len(base.tensors())


@pytest.mark.parametrize("kind", formats("nf4", "nf4-double"))
def test_the_bytes_are_those_of_the_arithmetic(kind: str) -> None:
    model = mlp(kind, (256, 512))
    base = quantised_base(model, model[0].weight)
    assert base is not None
    found = {name: tensor.numel() * tensor.element_size() for name, tensor in base.tensors().items()}
    # The codes are tables of the format, the same for every weight.
    held = sum(size for name, size in found.items() if not name.startswith(("code", "offset")))
    assert held == nf4_bytes(256 * 512, double=kind == "nf4-double")


def test_a_dense_weight_has_no_format() -> None:
    assert format_of(nn.Linear(4, 4).weight) is None
    assert quantised_base(nn.Linear(4, 4), torch.zeros(1)) is None


def test_importing_the_library_imports_none_of_the_packages() -> None:
    code = (
        "import sys, torch, sylva_compile; m = torch.nn.Sequential(torch.nn.Linear(32, 32));"
        "sylva_compile.trace_and_mask(m, method='random', block_size=16).embed(m);"
        "assert not {'bitsandbytes', 'torchao'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_bitsandbytes
def test_refuses_weights_that_are_packed_for_the_cpu_or_not_quantised() -> None:
    model = mlp("nf4", (32, 64))
    # bitsandbytes sets it to False when it unpacks a weight again, which changes the scales.
    for packed in (True, False):
        model[0].weight.quant_state.packing_format_for_cpu = packed
        with pytest.raises(ScopeError, match=r"packed for inference on the CPU .* load the model again"):
            check_weight("0.weight", model[0].weight)
        assert shape_of(model[0].weight) == (64, 32)
    import bitsandbytes

    raw = nn.Sequential(bitsandbytes.nn.Linear4bit(32, 64))
    with pytest.raises(ScopeError, match="is not quantised yet"):
        weights_in_scope(raw, "all-linear")
    floats = nn.Sequential(bitsandbytes.nn.Linear8bitLt(32, 64))
    with pytest.raises(ScopeError, match="not quantised to int8"):
        weights_in_scope(floats, "all-linear")


@needs_torchao
def test_refuses_layers_that_quantise_their_inputs() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 64))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ScopeError, match="quantises its inputs too"):
        weights_in_scope(model, "all-linear")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TritonV2QuantLinear", "GPTQ"),
        ("WQLinear_GEMM", "AWQ"),
        ("GGUFLinear", "GGUF"),
        ("Mxfp4GptOssExperts", "MXFP4"),
        ("NVFP4Linear", "NVFP4"),
        ("HQQLinear", "HQQ"),
        ("FP8Linear", "FP8"),
    ],
)
def test_refuses_other_formats_by_name(kind: str, name: str) -> None:
    made: Any = type(kind, (nn.Module,), {"__module__": "somewhere"})()
    assert refused_format(made) is not None
    model = nn.ModuleDict({"attention": nn.Linear(32, 32), "packed": made})
    with pytest.raises(ScopeError, match=rf"packed is quantised as {name}.*leave it out of scope"):
        weights_in_scope(model, ["packed"])
    with pytest.raises(ScopeError, match=rf"packed is quantised as {name}"):
        weights_in_scope(nn.ModuleDict({"packed": made}), "all-linear")
    assert list(weights_in_scope(model, "all-linear")) == ["attention.weight"]


def test_a_weight_of_a_refused_format_in_a_linear_layer_is_refused() -> None:
    linear = nn.Linear(32, 32)
    kind = type("GGUFParameter", (nn.Parameter,), {})
    linear.weight = kind(torch.zeros(32, 32))
    with pytest.raises(ScopeError, match="weight is quantised as GGUF"):
        sylva_compile.trace_and_mask(linear, method="random", block_size=16)
