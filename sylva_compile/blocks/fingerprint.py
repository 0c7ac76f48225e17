"""A quick fingerprint of tensors: tells one base model from another, on any device."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.shards import whole as values_of

_CHUNK = 1 << 22
_MULTIPLIER = 0x5851F42D4C957F2D


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """Return 16 hexadecimal digits that depend on every bit of `tensor`, on their order and on its dtype.

    Words of 64 bits are multiplied by a factor of their place and summed modulo 2⁶⁴: exact integer arithmetic, so the
    result is the same on every device, at the speed of memory. It guards against mistakes, not against malice.
    """
    whole = values_of(tensor).contiguous()
    if whole.storage_offset() * whole.element_size() % 8:
        # A slice of a larger tensor that begins amid a word cannot be seen as words.
        whole = whole.clone()
    data = whole.flatten().view(torch.uint8)
    words, rest = data.numel() // 8, data.numel() % 8
    body = data[: words * 8].view(torch.int64)
    total = torch.full((), words * 8 + rest, dtype=torch.int64, device=tensor.device)
    for start in range(0, words, _CHUNK):
        piece = body[start : start + _CHUNK]
        place = torch.arange(start, start + piece.numel(), device=tensor.device)
        # Mixing high bits into low ones first keeps the top bits of a word from mattering only to the top of the sum.
        total += ((piece ^ (piece >> 29)) * ((2 * place + 1) * _MULTIPLIER)).sum()
    if rest:
        place = torch.arange(1, rest + 1, device=tensor.device)
        total += (data[words * 8 :].to(torch.int64) * place).sum() * _MULTIPLIER
    return f"{int(total) % (1 << 64):016x}"


def base_fingerprint(weights: Iterable[Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on every bit of `weights`, in this order."""
    return hashlib.sha256("".join(map(checksum, weights)).encode()).hexdigest()[:16]


def is_other_base(config: Mapping[str, Any], weights: Iterable[Tensor]) -> bool:
    """Whether masks of `config` were made for other values than those of `weights`, which are in the masks' order."""
    wanted = config.get("base")
    return wanted is not None and base_fingerprint(weights) != wanted
