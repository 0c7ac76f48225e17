"""Small models whose linear layers are quantised, each in one of the formats that blocks train in."""

import importlib
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch import nn

BITSANDBYTES = ("nf4", "nf4-double", "fp4", "int8")
TORCHAO = ("torchao-int8", "torchao-float8", "torchao-int4", "torchao-nf4")
FORMATS = (*BITSANDBYTES, *TORCHAO[:3])
ALL = (*FORMATS, "torchao-nf4")
"""torchao's NF4Tensor quantises anew when it is copied, and so is in few of the tests."""

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
# Both packages warn when they are imported; pytest would take that for an error of the test.
quiet = pytest.mark.filterwarnings("ignore:::bitsandbytes.*", "ignore:::torchao.*")


def formats(*names: str) -> Any:
    """Return the formats as parameters of a test, each skipped where its package is missing."""
    needed = {name: needs_bitsandbytes if name in BITSANDBYTES else needs_torchao for name in names or FORMATS}
    return [pytest.param(name, marks=mark) for name, mark in needed.items()]


def quantise(model: nn.Module, kind: str, compute: torch.dtype | None = torch.float32) -> nn.Module:
    """Quantise every `nn.Linear` of `model` but an `lm_head`, in place, freeze the model, and return it."""
    model.requires_grad_(False)
    if kind in TORCHAO:
        _quantise_by_torchao(model, kind)
    else:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and name != "lm_head":
                    setattr(parent, name, _by_bitsandbytes(child, kind, compute))
    return model.requires_grad_(False)


def _by_bitsandbytes(linear: nn.Linear, kind: str, compute: torch.dtype | None) -> nn.Module:
    library = importlib.import_module("bitsandbytes").nn
    sizes: dict[str, Any] = {"bias": linear.bias is not None}
    if kind == "int8":
        layer = library.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, **sizes)
    else:
        double = kind.endswith("double")
        layer = library.Linear4bit(
            linear.in_features,
            linear.out_features,
            quant_type=kind.removesuffix("-double"),
            compress_statistics=double,
            compute_dtype=compute,
            **sizes,
        )
    layer.load_state_dict(linear.state_dict())
    if layer.bias is not None:
        layer.bias.data = linear.bias.data.clone()
    if kind != "int8":
        # In the dtype of the layer, which the quantised weight remembers.
        layer.weight.data = linear.weight.data.clone()
    quantised: nn.Module = layer.to(linear.weight.device).train(linear.training)
    return quantised


def _quantise_by_torchao(model: nn.Module, kind: str) -> None:
    library = importlib.import_module("torchao.quantization")
    if kind == "torchao-nf4":
        for name, module in model.named_modules():
            if type(module) is nn.Linear and "lm_head" not in name:
                # Small blocks of scales: the scales of a small weight must divide into them.
                packed = library.to_nf4(module.weight.detach(), 64, 2)
                module.weight = nn.Parameter(packed, requires_grad=False)
        return
    configurations = {
        "torchao-int8": lambda: library.Int8WeightOnlyConfig(),
        "torchao-float8": lambda: library.Float8WeightOnlyConfig(),
        "torchao-int4": lambda: library.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=importlib.import_module("torchao.quantization.granularity").PerGroup(16),
        ),
    }
    library.quantize_(
        model, configurations[kind](), lambda module, name: type(module) is nn.Linear and "lm_head" not in name
    )


def mlp(
    kind: str, sizes: tuple[int, ...] = (32, 64, 48), *, dtype: torch.dtype = torch.float32, bias: bool = True
) -> Any:
    """Return linear layers of `sizes` with GELU between them, quantised; names are "0.weight", "2.weight", ..."""
    layers: list[nn.Module] = []
    for size, after in itertools.pairwise(sizes):
        layers += [nn.Linear(size, after, bias=bias, dtype=dtype), nn.GELU()]
    return quantise(nn.Sequential(*layers[:-1]), kind)


def packed_bytes(model: nn.Module) -> dict[str, bytes]:
    """Return every bit of the packed weights of `model`, by weight name and tensor."""
    from sylva_compile.blocks.quantised_base import quantised_base
    from sylva_compile.blocks.scope import named_weights

    found = {}
    for name, weight in named_weights(model).items():
        base = quantised_base(model, weight)
        if base is not None:
            for key, tensor in base.tensors().items():
                plain = tensor.detach().clone().contiguous().flatten()
                found[f"{name}/{key}"] = plain.view(torch.uint8).numpy().tobytes()
    return found
