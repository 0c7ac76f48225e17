"""`BlockMask`: the chosen blocks of one weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError, MaskError
from sylva_compile.kernels.blocks import grid_shape

SUFFIX = "_blocks"
"""The blocks of the weight `name` are the Parameter `name + SUFFIX` of the same module."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The chosen blocks of one weight.

    Attributes:
        shape: `(m, n)` of the weight as stored; `(E·m, n)` of stacked experts `[E, m, n]`.
        block_size: b.
        positions: `int64[2, nnz]` on the CPU, block rows and block columns, sorted by row, then column.

    Raises:
        MaskError: positions have another shape or dtype, lie outside of the grid, repeat, or are not sorted.
    """

    shape: tuple[int, int]
    block_size: int
    positions: Tensor

    def __post_init__(self) -> None:
        rows, cols = grid_shape(self.shape, self.block_size)
        if self.positions.dim() != 2 or self.positions.shape[0] != 2 or self.positions.dtype != torch.int64:
            raise MaskError(
                f"Positions of a mask are {tuple(self.positions.shape)} of {self.positions.dtype} and must be "
                "int64[2, nnz]; make it with BlockMask.from_block_map."
            )
        # A copy, since the caller may change its tensor later; contiguous, since files hold it.
        object.__setattr__(self, "positions", self.positions.clone(memory_format=torch.contiguous_format))
        place = self.rows * cols + self.cols
        inside = (self.rows >= 0) & (self.rows < rows) & (self.cols >= 0) & (self.cols < cols)
        if not bool(inside.all()) or not bool((place[1:] > place[:-1]).all()):
            raise MaskError(
                f"Blocks of a mask of shape {self.shape} must lie in its {rows} x {cols} grid, sorted by row and "
                "column, each once; make it with BlockMask.from_block_map."
            )

    @classmethod
    def from_block_map(cls, block_map: Tensor, shape: tuple[int, ...], block_size: int) -> "BlockMask":
        """Make the mask whose blocks are true in `block_map bool[ceil(m/b), ceil(n/b)]`.

        Raises:
            MaskError: `block_map` has another shape.
        """
        shape = (int(shape[0]), int(shape[1]))
        grid = grid_shape(shape, block_size)
        if tuple(block_map.shape) != grid:
            raise MaskError(
                f"A block map of shape {tuple(block_map.shape)} does not tile a weight of shape {shape} with blocks of "
                f"{block_size}; make it {grid}."
            )
        chosen = block_map.detach().to("cpu", torch.bool)
        return cls(shape, block_size, chosen.nonzero().t())

    @property
    def rows(self) -> Tensor:
        """Block rows, `int64[nnz]`."""
        return self.positions[0]

    @property
    def cols(self) -> Tensor:
        """Block columns, `int64[nnz]`."""
        return self.positions[1]

    @property
    def nnz(self) -> int:
        """Number of blocks."""
        return self.positions.shape[1]

    @property
    def trainable(self) -> int:
        """Number of weight elements inside the blocks, without the padding of blocks that cross the edge."""
        b, (m, n) = self.block_size, self.shape
        return int(((m - self.rows * b).clamp(max=b) * (n - self.cols * b).clamp(max=b)).sum())

    def block_map(self) -> Tensor:
        """Return `bool[ceil(m/b), ceil(n/b)]`, true where a block is trained."""
        chosen = torch.zeros(grid_shape(self.shape, self.block_size), dtype=torch.bool, device="cpu")
        chosen[self.rows, self.cols] = True
        return chosen

    def dense(self) -> Tensor:
        """Return `bool[m, n]`, true where an element is trained."""
        b, (m, n) = self.block_size, self.shape
        return self.block_map().repeat_interleave(b, 0)[:m].repeat_interleave(b, 1)[:, :n]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        same_kind = (self.shape, self.block_size) == (other.shape, other.block_size)
        return same_kind and torch.equal(self.positions, other.positions)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        total = self.block_map().numel()
        return f"BlockMask(shape={self.shape}, block_size={self.block_size}, nnz={self.nnz} of {total})"


def check_inside_experts(block_size: int, name: str, shape: Sequence[int]) -> None:
    """Raise ArgumentError if blocks of the stacked experts `name`, `[E, m, n]`, would cross from one into the next."""
    if len(shape) == 3 and shape[1] % block_size:
        raise ArgumentError(
            f"{name} stacks experts of {shape[1]} rows, which block_size={block_size} does not divide, so that blocks "
            f"would cross from one expert into the next; use a divisor of {shape[1]}, or leave it out of the scope."
        )


def check_block_fits(block_size: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ArgumentError if a block is larger than every dimension of every weight in `shapes`, by name.

    And if blocks of stacked experts would cross from one expert into the next.
    """
    for name, shape in shapes.items():
        check_inside_experts(block_size, name, shape)
    largest = max((size for shape in shapes.values() for size in shape[-2:]), default=0)
    if shapes and block_size > largest:
        raise ArgumentError(
            f"block_size={block_size} is larger than every dimension in scope (at most {largest}); use a smaller one."
        )
