"""The formats of bitsandbytes: NF4 and FP4 (`Linear4bit`), with double quantisation or without, and `Linear8bitLt`."""

from typing import Any

import torch
from torch import Tensor


class Bits4:
    """`Linear4bit`: blocks of 64 values, each with a scale; the scales are quantised again where `nested`."""

    name = "bitsandbytes-4bit"
    keeps_input_dtype = True
    knows_dtype = True

    def matches(self, weight: Tensor) -> bool:
        """Whether `weight` is a `Params4bit`."""
        return type(weight).__name__ == "Params4bit"

    def refusal(self, weight: Any) -> str | None:
        """Refuse weights that are not quantised yet, were packed for inference on the CPU, or lie transposed."""
        state = weight.quant_state
        if state is None:
            return "is not quantised yet; move the model with model.to(device) first"
        # False where it was unpacked again: with scales rounded to bfloat16, and those of plain NF4 still transposed.
        if getattr(state, "packing_format_for_cpu", None) is not None:
            return (
                "was packed for inference on the CPU by an evaluation, and bitsandbytes does not unpack it exactly; "
                "load the model again, and embed masks or load adapters before it is evaluated"
            )
        module = weight.module
        if module is not None and tuple(state.shape) != (module.out_features, module.in_features):
            return "was quantised transposed; quantise it as [out_features, in_features], or leave it out of scope"
        return None

    def shape(self, weight: Any) -> tuple[int, int]:
        """Return the shape before quantisation, which the quantisation state knows."""
        m, n = (weight if weight.quant_state is None else weight.quant_state).shape
        return int(m), int(n)

    def dtype(self, weight: Any) -> torch.dtype:
        """Return the dtype before quantisation."""
        dtype: torch.dtype = weight.quant_state.dtype
        return dtype

    def input_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """Return `compute_dtype` of the layer, which is that of its first input where nobody has set it."""
        if not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
            return x.dtype
        return x.dtype if module.compute_dtype is None else module.compute_dtype

    def value_dtype(self, module: Any) -> torch.dtype:
        """Return `compute_dtype` where it is set, else the dtype before quantisation."""
        return module.compute_dtype or self.dtype(module.weight)

    def dequantise(self, module: Any) -> Tensor:
        """Return the weight in its dtype before quantisation."""
        from bitsandbytes.functional import dequantize_4bit

        weight = module.weight
        dense: Tensor = dequantize_4bit(weight, weight.quant_state)
        return dense

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """Return codes and scales; of nested ones, what makes the scales as well."""
        state = module.weight.quant_state
        found = {"weight": module.weight, "absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"offset": state.offset, "absmax2": state.state2.absmax, "code2": state.state2.code}
        return found

    def metadata(self, module: Any) -> dict[str, Any]:
        """Return the type, the sizes of blocks, and the dtype."""
        state = module.weight.quant_state
        found = {"type": state.quant_type, "blocksize": state.blocksize, "dtype": _word(state.dtype)}
        return found | ({"nested": state.state2.blocksize} if state.nested else {})


class Bits8:
    """`Linear8bitLt` without float16 weights: a scale for each row."""

    name = "bitsandbytes-8bit"
    keeps_input_dtype = False
    knows_dtype = False

    def matches(self, weight: Tensor) -> bool:
        """Whether `weight` is an `Int8Params`."""
        return type(weight).__name__ == "Int8Params"

    def refusal(self, weight: Any) -> str | None:
        """Refuse weights that are not quantised, or are quantised again in each pass."""
        if weight.dtype != torch.int8 or weight.has_fp16_weights:
            return "is not quantised to int8 (has_fp16_weights?); use has_fp16_weights=False and model.to(device) first"
        return None

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return the shape, which quantisation keeps."""
        return int(weight.shape[0]), int(weight.shape[1])

    def dtype(self, weight: Tensor) -> torch.dtype:
        """Return float32: the scales' dtype, since nothing tells the dtype before quantisation."""
        return torch.float32

    def input_dtype(self, module: Any, x: Tensor) -> torch.dtype:
        """Return the dtype of `x`."""
        return x.dtype

    def value_dtype(self, module: Any) -> torch.dtype:
        """Return float32: the layer computes in the dtype of whatever input comes."""
        return torch.float32

    def dequantise(self, module: Any) -> Tensor:
        """Return the weight, float32."""
        codes, scales = _codes_and_scales(module)
        return codes.to(torch.float32) * (scales * (1.0 / 127.0)).unsqueeze(1)

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """Return codes and scales."""
        codes, scales = _codes_and_scales(module)
        return {"weight": codes, "SCB": scales}

    def metadata(self, module: Any) -> dict[str, Any]:
        """Return nothing: codes and scales tell all."""
        return {}


def _codes_and_scales(module: Any) -> tuple[Tensor, Tensor]:
    """Return `int8[m, n]` and `float32[m]`, which the first forward pass of the module moves from weight to state."""
    held = module.weight if module.weight.CB is not None else module.state
    return held.CB, held.SCB


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FORMATS = (Bits4(), Bits8())
