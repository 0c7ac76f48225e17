"""Keep bitsandbytes from packing 4-bit weights for inference while a model carries blocks.

On a CPU with AVX512-BF16, an evaluation packs every 4-bit weight, and training goes on with the packed ones. Their
product has no backward pass: it passes no gradient on to the layers before, without a word. A layer whose weight
carries blocks has a `forward` of its own; the others are kept from packing here.
"""

from torch import nn

from sylva_compile.errors import EmbedError

_FLAG, _HELD = "support_avx512bf16_for_cpu", "_sylva_packs"


def check_unpacked(model: nn.Module) -> None:
    """Raise EmbedError if an evaluation has packed a weight of `model`."""
    for name, module in model.named_modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise EmbedError(
                f"{name}.weight was packed for inference on the CPU by an evaluation, and passes no gradient on; load "
                "the model again, and embed masks or load adapters before it is evaluated."
            )


def keep_unpacked(model: nn.Module) -> None:
    """Let no evaluation pack weights of `model` from now on."""
    for module in model.modules():
        if module.__dict__.get(_FLAG):
            module.__dict__[_HELD], module.__dict__[_FLAG] = module.__dict__[_FLAG], False


def let_pack(model: nn.Module) -> None:
    """Undo `keep_unpacked`."""
    for module in model.modules():
        if _HELD in module.__dict__:
            module.__dict__[_FLAG] = module.__dict__.pop(_HELD)
