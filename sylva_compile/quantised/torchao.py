"""The formats of torchao that keep weights alone: int8, int4 to int8 (intx), float8 and NF4, as tensor subclasses."""

from typing import Any

import torch
from torch import Tensor

_NAMES = {
    "Int8Tensor": "torchao-int8",
    "IntxUnpackedToInt8Tensor": "torchao-intx",
    "Float8Tensor": "torchao-float8",
    "NF4Tensor": "torchao-nf4",
}
"""The classes that `Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`, `Float8WeightOnlyConfig` and `to_nf4` make."""

_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")
"""The attributes that a tensor has where the layer quantises its inputs too, or scales them (SmoothQuant)."""


class WeightOnly:
    """A weight that torchao dequantises in each forward pass."""

    keeps_input_dtype = False
    knows_dtype = True

    def __init__(self, kind: str, name: str) -> None:
        """`kind` is the name of the class of the weights."""
        self.kind, self.name = kind, name

    def matches(self, weight: Tensor) -> bool:
        """Whether `weight` is of the class."""
        return type(weight).__name__ == self.kind

    def refusal(self, weight: Any) -> str | None:
        """Refuse layers that quantise or scale their inputs too: their products are others than those of the weight."""
        if any(getattr(weight, name, None) is not None for name in _OF_ACTIVATIONS):
            why = "belongs to a layer that quantises its inputs too, or scales them"
            return f"{why}; use a weight-only configuration of torchao"
        return None

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return the shape, which the subclass shows."""
        return int(weight.shape[0]), int(weight.shape[1])

    def dtype(self, weight: Tensor) -> torch.dtype:
        """Return the dtype, which the subclass shows."""
        return weight.dtype

    def input_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """Return the dtype of `x`."""
        return x.dtype

    def value_dtype(self, module: Any) -> torch.dtype:
        """Return the dtype of the weight."""
        return self.dtype(module.weight)

    def dequantise(self, module: Any) -> Tensor:
        """Return the weight in its dtype."""
        weight = module.weight
        dense: Tensor = weight.get_original_weight() if self.kind == "NF4Tensor" else weight.dequantize()
        return dense.contiguous()

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """Return the tensors that the subclass consists of."""
        weight = module.weight
        names, _ = weight.__tensor_flatten__()
        return {name: getattr(weight, name) for name in names}

    def metadata(self, module: Any) -> dict[str, Any]:
        """Return the dtype and the sizes of the blocks that share a scale."""
        weight = module.weight
        block = getattr(weight, "block_size", None)
        found = {"dtype": str(weight.dtype).removeprefix("torch.")}
        if isinstance(block, int):
            return found | {"block": block, "scaler_block": weight.scaler_block_size}
        return found | ({} if block is None else {"block": "x".join(map(str, block))})


FORMATS = tuple(WeightOnly(kind, name) for kind, name in _NAMES.items())
