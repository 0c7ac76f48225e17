"""The base of a weight, whether it is a dense parameter or a quantised one: its shape, kind, checksum and values."""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.scope import owners_of
from sylva_compile.blocks.shards import whole
from sylva_compile.errors import ScopeError
from sylva_compile.quantised.format import QuantisedBase
from sylva_compile.quantised.registry import format_of

_READ_BY_OTHERS = ("NonDynamicallyQuantizableLinear",)
"""Linear layers whose weight the module above them multiplies by itself."""


def quantised_base(model: nn.Module, weight: Tensor) -> QuantisedBase | None:
    """Return the quantised base that `weight`, a parameter of `model`, is; None if it is dense."""
    found = format_of(weight)
    if found is None:
        return None
    return next((QuantisedBase(module, found) for module, name in owners_of(model, weight) if name == "weight"), None)


def kind_of(model: nn.Module, weight: Tensor) -> str:
    """Return what adapters call a weight's base: the dtype of a dense one, the format of a quantised one."""
    base = quantised_base(model, weight)
    return str(weight.dtype).removeprefix("torch.") if base is None else base.kind


def checksum_of(model: nn.Module, weight: Tensor) -> str:
    """Return a checksum of the base `weight` of `model`; that of a quantised one reads its packed tensors."""
    base = quantised_base(model, weight)
    return checksum(weight) if base is None else checksum_of_base(base)


def checksum_of_base(base: QuantisedBase) -> str:
    """Return 16 hexadecimal digits that depend on every packed bit of `base`, and on its kind."""
    parts = [base.kind, *(f"{name} {checksum(tensor)}" for name, tensor in sorted(base.tensors().items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def tensors_of_bases(model: nn.Module, weights: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that hold the bases `weights` of `model`, for fingerprints."""
    found: list[Tensor] = []
    for weight in weights:
        base = quantised_base(model, weight)
        found += [weight] if base is None else base.tensors().values()
    return found


def dense_values(model: nn.Module, weight: Tensor) -> Tensor:
    """Return the values of the base `weight` of `model`, `[m, n]`; those of a quantised one are dequantised."""
    base = quantised_base(model, weight)
    return whole(weight) if base is None else base.dense()


def check_can_carry(model: nn.Module, weights: Mapping[str, Tensor], block_size: int) -> None:
    """Raise ScopeError where blocks of `block_size` cannot be trained in a quantised one of `weights` of `model`.

    That is so where they would cross its edge, or where its layer has a `forward` of its own: that of the library takes
    its place.
    """
    check_blocks_divide(weights, block_size)
    for name, weight in weights.items():
        if format_of(weight) is None:
            continue
        for module, attribute in owners_of(model, weight):
            if attribute != "weight" or not _is_ordinary(module):
                raise ScopeError(
                    f"{name} is quantised and the {attribute} of a {type(module).__name__} whose forward is not that "
                    "of a linear layer (hooks of accelerate?); load the model on one device, or leave it out of scope."
                )


def _is_ordinary(module: nn.Module) -> bool:
    """Whether `module` computes by the `forward` of a linear layer of torch or bitsandbytes."""
    kind = type(module)
    known = kind.forward.__module__.partition(".")[0] in ("bitsandbytes", "torch")
    return known and "forward" not in vars(module) and kind.__name__ not in _READ_BY_OTHERS


def check_blocks_divide(weights: Mapping[str, Tensor], block_size: int) -> None:
    """Raise ScopeError if blocks would cross the edge of a quantised weight."""
    for name, weight in weights.items():
        found = format_of(weight)
        if found is not None and any(size % block_size for size in found.shape(weight)):
            raise ScopeError(
                f"{name} is {found.shape(weight)} and quantised, and blocks of {block_size} do not divide it; choose a "
                "block_size that does, or leave it out of scope."
            )
