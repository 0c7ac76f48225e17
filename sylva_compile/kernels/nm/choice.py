"""Choose the kernel of an N:M product: the sparse one, unless the dense one is measurably faster.

The first product of a class of shapes runs both on made-up data and keeps their times beside the compiled code, so that
later processes on this machine choose alike. Two processes that measure the same class at the same time may differ;
their results then differ by rounding. Under `torch.use_deterministic_algorithms(True)` nothing is measured.
"""

import functools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sylva_compile.kernels.build.code_cache import cached
from sylva_compile.kernels.build.native import processor
from sylva_compile.kernels.nm import cpu, cuda, libraries
from sylva_compile.kernels.nm_codes import pack
from sylva_compile.kernels.nm_mm import nm_mm_reference

log = logging.getLogger(__name__)

LARGEST = {"cpu": (256, 1024), "cuda": (8192, 1 << 30)}
"""Tokens and rows of the largest product that is measured: from there on, the times of both kernels grow alike."""

_SMALL = 1 << 22
_MARGIN = 0.95
_ROUNDS = 3


@dataclass(frozen=True)
class Choice:
    """The kernel of a product, and why.

    Attributes:
        kernel: "sparse" (the compiled kernel of the CPU), "cusparselt", or "dense": the product with the dense matrix.
        why: one line.
    """

    kernel: Literal["sparse", "cusparselt", "dense"]
    why: str


@dataclass(frozen=True)
class Product:
    """The shape of a product `x [tokens, in_features] · Wᵀ`, W `[rows, in_features]` with n of every m values."""

    tokens: int
    rows: int
    in_features: int
    n: int
    m: int
    dtype: torch.dtype
    device: torch.device

    @property
    def per_row(self) -> int:
        """The number of values in a row of W."""
        return self.in_features // self.m * self.n

    def class_of(self) -> "Product":
        """Return the product that is measured for this one: tokens rounded up to a power of two, sizes limited."""
        most_tokens, most_rows = LARGEST[self.device.type]
        tokens = min(1 << max(self.tokens - 1, 0).bit_length(), most_tokens)
        return replace(self, tokens=tokens, rows=min(self.rows, most_rows))


def choose_kernel(
    tokens: int,
    rows: int,
    in_features: int,
    n: int,
    m: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    transposed: bool = False,
) -> Choice:
    """Return the kernel that `sylva::nm_mm` runs for a shape, by this process's number of threads.

    Args:
        tokens: rows of `x`.
        rows: rows of W.
        in_features: columns of W.
        n: how many values of m neighbours W keeps.
        m: out of how many.
        dtype: of `x` and of the values.
        device: where they lie.
        transposed: whether the product is `x · W`.

    Returns:
        The choice. For a shape of a class that was never measured on this machine, this call measures it.
    """
    product = Product(tokens, rows, in_features, n, m, dtype, torch.device(device))
    if product.device.type not in ("cpu", "cuda"):
        return Choice("dense", f"there is no kernel for {product.device.type}")
    if transposed:
        return Choice("dense", "x · W has no sparse kernel")
    return _on_cpu(product) if product.device.type == "cpu" else _on_cuda(product)


def _on_cpu(product: Product) -> Choice:
    if product.dtype not in cpu.DTYPES:
        return Choice("dense", f"{_name(product.dtype)} has no sparse kernel on the CPU, float32 and bfloat16 have")
    if not cpu.is_compiled():
        return Choice("dense", "there is no C++ compiler")
    if product.tokens * product.rows * product.per_row < _SMALL:
        return Choice("sparse", "the product is too small to be worth measuring")
    if torch.are_deterministic_algorithms_enabled():
        return Choice("sparse", "deterministic algorithms are asked for, so nothing is measured")
    return _faster("sparse", times(product.class_of(), torch.get_num_threads()))


def _on_cuda(product: Product) -> Choice:
    missing = cuda.missing(product.rows, product.in_features, product.n, product.m, product.dtype, product.device)
    if missing is not None:
        return Choice("dense", missing)
    if torch.are_deterministic_algorithms_enabled():
        return Choice("dense", "deterministic algorithms are asked for, so nothing is measured")
    if torch.cuda.is_current_stream_capturing():
        return Choice("dense", "a CUDA graph is being captured, so nothing can be measured")
    return _faster("cusparselt", times(product.class_of(), 0))


def _faster(sparse: Literal["sparse", "cusparselt"], found: dict[str, float]) -> Choice:
    said = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found.items())
    is_slower = found["dense"] < _MARGIN * found["sparse"]
    return Choice("dense" if is_slower else sparse, f"measured on this machine: {said}")


@functools.cache
def times(product: Product, threads: int) -> dict[str, float]:
    """Return the seconds of the sparse and of the dense kernel, measured once on this machine for each class."""
    key = "\0".join(
        [
            "choice of an N:M product",
            libraries.source("nm_mm.cpp"),
            _machine(product.device),
            repr(product),
            str(threads),
        ]
    )

    def build() -> bytes:
        found = measure(product)
        log.info("N:M product %s, %d threads: %s", product, threads, found)
        return json.dumps(found).encode()

    try:
        kept: dict[str, float] = json.loads(cached(key, ".json", build).read_text())
    except OSError:
        return measure(product)
    return kept


def measure(product: Product) -> dict[str, float]:
    """Return the seconds of the sparse and of the dense kernel for this very shape, the fastest of some rounds."""
    made, on_cpu = (*operands(product), product.n, product.m), product.device.type == "cpu"
    kernels: dict[str, Callable[[], Tensor]] = {
        "sparse": lambda: (cpu.sparse_product if on_cpu else cuda.packed_and_multiplied)(*made),
        "dense": lambda: (cpu.dense_product if on_cpu else nm_mm_reference)(*made, False),
    }
    found = dict.fromkeys(kernels, float("inf"))
    # Autocast, which is on while a layer's forward pass runs, would time another product.
    with torch.autocast(product.device.type, enabled=False):
        for round_ in range(_ROUNDS + 1):
            for name, kernel in kernels.items():
                started = time.perf_counter()
                kernel()
                if not on_cpu:
                    torch.cuda.synchronize(product.device)
                if round_:
                    found[name] = min(found[name], time.perf_counter() - started)
    return found


def operands(product: Product) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, values and codes of this shape; the places in a group are neighbours, shifted from group to group."""
    device, dtype, (n, m) = product.device, product.dtype, (product.n, product.m)
    x = torch.ones((product.tokens, product.in_features), dtype=dtype, device=device)
    values = torch.ones((product.rows, product.per_row), dtype=dtype, device=device)
    k = torch.arange(product.per_row, device=device)
    shift = (torch.arange(product.rows, device=device)[:, None] + k // n) % (m - n + 1)
    return x, values, pack(k % n + shift, m)


def _machine(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{processor()} {torch.__version__}"
    return f"{torch.cuda.get_device_name(device)} {torch.__version__} {torch.version.cuda} {cuda.version()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
