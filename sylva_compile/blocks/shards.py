"""Weights and blocks that `fully_shard` splits over processes: reading and writing their values.

FSDP2 keeps a DTensor in place of each parameter, of which every process holds a range of rows, and gathers the whole
tensor before a pass. Blocks that lie in a weight's rows are written by the process that holds the rows, a range of each
block if need be. To read them, every process gives what it holds, and -0.0 elsewhere: the sum is exact, since x + -0.0
is x for every x.

The functions take ordinary tensors as well, and then do nothing but the obvious. All that read a DTensor are
collective: every process calls them, in the same order.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp, all_gather, all_reduce, get_world_size

from sylva_compile._torch import group_of_mesh, shard_of
from sylva_compile.blocks.places import zero_outside
from sylva_compile.kernels.blocks import BlockCopier, BlockWriter, read_blocks

_MOST_GATHERED = 1 << 28
"""The most bytes of blocks that are gathered at a time."""


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor."""
    # One exists only once its module is imported, which takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_split_by_rows(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor that processes hold in ranges of rows, along one dimension of their mesh."""
    if not is_sharded(tensor):
        return False
    split = [placement for placement in tensor.placements if not placement.is_replicate()]
    return len(split) <= 1 and all(placement.is_shard(0) for placement in split)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, in the same memory."""
    return shard_of(tensor) if is_sharded(tensor) else tensor


def compute_device(tensor: Any) -> torch.device:
    """Return the device on which a pass reads `tensor`: shards may be kept on the CPU while passes run on a GPU."""
    device: torch.device = tensor.device
    if is_sharded(tensor) and device.type != (kind := tensor.device_mesh.device_type):
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return device


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return the values of all of `tensor`; those of a DTensor are gathered."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Copy `values`, in the shape of all of `tensor`, into what this process holds of it."""
    if not is_sharded(tensor):
        tensor.copy_(values)
        return
    first, end = rows_of(tensor)
    local(tensor).copy_(values[first:end])
    # Autograd counts the writes into a DTensor apart from those into its memory.
    torch.autograd.graph.increment_version(tensor)


def split_modules(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that `fully_shard` has taken, the outer ones first."""
    # There are some only once its package is imported, which takes a second.
    package = sys.modules.get("torch.distributed.fsdp")
    return [] if package is None else [module for module in model.modules() if isinstance(module, package.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let `fully_shard` free what it still holds gathered of `model`; its parameters are the shards then.

    All processes call it: the next pass gathers again on all of them. After an evaluation, the parameters of the
    outermost module, and of others with `reshard_after_forward=False`, are gathered tensors until a backward pass.
    """
    for module in split_modules(model):
        module.reshard()


def rows_of(tensor: Any) -> tuple[int, int]:
    """Return the range of rows that this process holds of a DTensor."""
    # Importing it takes a second, and who has a DTensor has done so.
    from sylva_compile._torch import shard_shape_and_offset

    shape, offset = shard_shape_and_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0]), int(offset[0]) + int(shape[0])


def group_of(tensor: Any) -> ProcessGroup | None:
    """Return the processes over which a DTensor is split; None for an ordinary tensor, and for one that is not."""
    if not is_sharded(tensor):
        return None
    at = [number for number, placement in enumerate(tensor.placements) if placement.is_shard()]
    group: ProcessGroup | None = tensor.device_mesh.get_group(at[0]) if at else None
    return group


def processes_of(tensor: Any) -> ProcessGroup | None:
    """Return all processes that hold a part or a copy of a DTensor; None for an ordinary tensor."""
    if not is_sharded(tensor):
        return None
    mesh = tensor.device_mesh
    if mesh.ndim > 1 and mesh.size() == get_world_size():
        return dist.group.WORLD
    found: ProcessGroup = mesh.get_group() if mesh.ndim == 1 else group_of_mesh(mesh)
    return found


class ShardWriter:
    """Copies blocks into matrices that are split by rows as the first one is, and out of them.

    It is the `BlockWriter` of DTensors, and reads as well.
    """

    def __init__(self, matrix: Any, positions: Tensor, block_size: int) -> None:
        """Find the rows of the blocks at `positions int64[2, nnz]` that this process holds of `matrix [m, n]`."""
        positions = positions.to(local(matrix).device, copy=True)
        self._shape, self._positions, self._b = matrix.shape, positions, block_size
        self._inside, self._width = matrix.shape[1] // block_size, matrix.shape[1] % block_size
        first, end = rows_of(matrix)
        lane = torch.arange(block_size, device=positions.device)
        row = positions[0][:, None] * block_size + lane
        block, lane = ((row >= first) & (row < end)).nonzero(as_tuple=True)
        row, column = row[block, lane] - first, positions[1][block]
        over = column >= self._inside
        # Of each row of a block: the block, the row in it, the row of this process, and the block column.
        self._inner, self._over = (
            tuple(index[chosen] for index in (block, lane, row, column)) for chosen in (~over, over)
        )

    def _pieces(self, matrix: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...], int]]:
        """Yield views `[rows, columns, width]` of this process's rows, each with the rows of blocks that lie in it."""
        rows, inner = local(matrix), self._inside * self._b
        if self._inside:
            yield rows[:, :inner].unflatten(1, (self._inside, self._b)), self._inner, self._b
        if self._width:
            block, lane, row, column = self._over
            yield rows[:, None, inner:], (block, lane, row, torch.zeros_like(column)), self._width

    @torch.no_grad()
    def read(self, matrix: Tensor) -> Tensor:
        """Return the blocks of `matrix`, `[nnz, b, b]`, on every process."""
        blocks = local(matrix).new_full((self._positions.shape[1], self._b, self._b), -0.0)
        for view, (block, lane, row, column), width in self._pieces(matrix):
            blocks[block, lane, :width] = view[row, column]
        group = group_of(matrix)
        if group is not None:
            all_reduce(blocks, op=ReduceOp.SUM, group=group)
        return zero_outside(blocks, self._positions, self._shape)

    @torch.no_grad()
    def write(self, matrix: Tensor, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]`, rounded to the matrix's dtype, into the rows of this process."""
        rows = local(matrix)
        blocks = blocks.to(rows.device)
        for view, (block, lane, row, column), width in self._pieces(matrix):
            view[row, column] = blocks[block, lane, :width].to(rows.dtype)


class ShardCopier:
    """The `BlockCopier` of a DTensor."""

    def __init__(self, matrix: Tensor, positions: Tensor, block_size: int) -> None:
        """Copy blocks of `matrix [m, n]`, which is split by rows, at `positions int64[2, nnz]`."""
        self._matrix, self._writer = matrix, ShardWriter(matrix, positions, block_size)

    def read(self) -> Tensor:
        """Return the blocks, `[nnz, b, b]`, on every process."""
        return self._writer.read(self._matrix)

    def write(self, blocks: Tensor) -> None:
        """Write `blocks [nnz, b, b]` into the rows of this process."""
        self._writer.write(self._matrix, blocks)


def writer_of(matrix: Tensor, positions: Tensor, block_size: int) -> BlockWriter | ShardWriter:
    """Return what writes blocks into `matrix [m, n]`."""
    if is_sharded(matrix):
        return ShardWriter(matrix, positions, block_size)
    return BlockWriter(matrix.shape, positions, block_size)


def copier_of(matrix: Tensor, positions: Tensor, block_size: int) -> BlockCopier | ShardCopier:
    """Return what copies blocks out of `matrix [m, n]` and back."""
    kind = ShardCopier if is_sharded(matrix) else BlockCopier
    return kind(matrix, positions, block_size)


def read_places(matrix: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the blocks of `matrix [m, n]` at `positions int64[2, nnz]`: `[nnz, b, b]`."""
    if is_sharded(matrix):
        return ShardWriter(matrix, positions, block_size).read(matrix)
    return read_blocks(matrix.detach(), positions, block_size)


@torch.no_grad()
def equal_everywhere(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, split alike, are equal on all processes."""
    same = torch.equal(local(one), local(other))
    group = group_of(one)
    if group is None:
        return same
    agreed = torch.tensor(int(same), device=local(one).device)
    all_reduce(agreed, op=ReduceOp.MIN, group=group)
    return bool(agreed)


@torch.no_grad()
def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the whole values of DTensors that are split by rows alike, by one message for many of them."""
    found: list[Tensor] = []
    for batch in _batches(tensors):
        group = group_of(batch[0])
        if group is None:
            found += [whole(tensor) for tensor in batch]
            continue
        ranks = get_world_size(group)
        most = [-(-tensor.shape[0] // ranks) for tensor in batch]
        sizes = [rows * tensor[:1].numel() if tensor.shape[0] else 0 for rows, tensor in zip(most, batch, strict=True)]
        mine = local(batch[0]).new_zeros(sum(sizes))
        for piece, tensor in zip(mine.split(sizes), batch, strict=True):
            piece[: local(tensor).numel()] = local(tensor).flatten()
        every = mine.new_empty((ranks, mine.numel()))
        all_gather(list(every.unbind()), mine, group=group)
        for piece, rows, tensor in zip(every.split(sizes, dim=1), most, batch, strict=True):
            found.append(piece.reshape(ranks * rows, *tensor.shape[1:])[: tensor.shape[0]])
    return found


def _batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in order, in runs of one dtype and group that are not too large."""
    batches: list[list[Tensor]] = []
    size, last = 0, None
    for tensor in tensors:
        kind = (tensor.dtype, group_of(tensor), local(tensor).device)
        size += tensor.numel() * tensor.element_size()
        if kind != last or size > _MOST_GATHERED:
            batches.append([])
            size, last = tensor.numel() * tensor.element_size(), kind
        batches[-1].append(tensor)
    return batches
