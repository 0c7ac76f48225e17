"""A gate of a custom op: a switch on the CPU that is read each time the op runs, so that graphs stay as they are.

A product whose gate is closed is skipped, and zeros stand for its result. The gate is a tensor and no Python value, so
that Dynamo adds no guard for it; it is on the CPU, so that reading it waits for no device, and that Inductor captures
no CUDA graph around it, which would keep one state for ever.
"""

from collections.abc import Callable

from torch import Tensor

from sylva_compile.kernels.blocks import block_dtype


def is_closed(gate: Tensor | None) -> bool:
    """Return whether `gate`, bool `[]` on the CPU, is there and false."""
    return gate is not None and not bool(gate)


def nothing(like: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return zeros in place of blocks at `positions int64[2, nnz]`: `[nnz, b, b]`."""
    return like.new_zeros((positions.shape[1], block_size, block_size), dtype=block_dtype(like.dtype))


def gated(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `kernel(lhs, rhs, positions, block_size)` with a gate as fifth argument."""

    def call(lhs: Tensor, rhs: Tensor, positions: Tensor, block_size: int, gate: Tensor | None = None) -> Tensor:
        return nothing(rhs, positions, block_size) if is_closed(gate) else kernel(lhs, rhs, positions, block_size)

    return call


def gated_shared(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return `kernel(lhs, rhs, positions, block_size)`, of several weights, with a gate as fifth argument."""

    def call(
        lhs: list[Tensor], rhs: Tensor, positions: list[Tensor], block_size: int, gate: Tensor | None = None
    ) -> list[Tensor]:
        if is_closed(gate):
            return [nothing(rhs, at, block_size) for at in positions]
        return kernel(lhs, rhs, positions, block_size)

    return call
