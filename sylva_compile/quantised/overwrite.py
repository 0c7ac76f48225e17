"""`overwrite`: blocks written into a dense weight, in a form that compilers fuse and passes find."""

import torch
from torch import Tensor


def overwrite(dense: Tensor, blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return `dense [m, n]` with `blocks [nnz, b, b]` at `positions int64[2, nnz]`; b divides m and n.

    Blocks are rounded to the dtype of `dense`. A row of a block lies in one piece in memory, so the weight is indexed
    as `[m * n / b, b]`: one `aten.index_put`, which `passes/recompute_weights.py` looks for.
    """
    # The size is a number, and not one of the shape of `blocks`, which may vary from layer to layer in a graph.
    rows = dense.view(-1, block_size)
    values = blocks.to(dense.dtype).reshape(-1, block_size)
    return rows.index_put((pieces(positions, dense.shape[1], block_size),), values).view(dense.shape)


@torch.no_grad()
def overwrite_(dense: Tensor, blocks: Tensor, positions: Tensor) -> Tensor:
    """Do the same in place, without autograd, and return `dense`."""
    b = blocks.shape[-1]
    values = blocks.to(dense.dtype).reshape(-1, b)
    dense.view(-1, b).index_copy_(0, pieces(positions, dense.shape[1], b), values)
    return dense


def pieces(positions: Tensor, width: int, block_size: int) -> Tensor:
    """Return the index among `[m * width / b, b]` of every row of every block: `int64[nnz * b]`."""
    lane = torch.arange(block_size, device=positions.device)
    across = width // block_size
    return ((positions[0][:, None] * block_size + lane) * across + positions[1][:, None]).flatten()
