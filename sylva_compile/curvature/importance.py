"""Block scores from a weight's Kronecker factors: the paper's importance and the block gain.

Notation of the paper: inputs `x [T, n]`, output gradients `gy [T, m]`, `A = E[x xᵀ]`, `G = E[gy gyᵀ]`, mean gradient
`Γ [m, n]` with columns `γ_j` and rows `γ_k`. K-FAC approximates the curvature of the weight by `G ⊗ A`. `greedy.py`
holds the greedy choice of blocks.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.curvature.base import sum_groups
from sylva_compile.kernels.blocks import grid_shape

log = logging.getLogger(__name__)

PAPER_DAMPING = 1e-3
GAIN_DAMPING = 0.1


def importance(
    gradient: Tensor, a_times: Tensor, g_times: Tensor, a_inverse_diagonal: Tensor, g_inverse_diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the importance of every output and of every input (Sylva, eqn 19 and 20).

        input j:   γ_jᵀ G γ_j / [A⁻¹]_jj          output k:   γ_k A γ_kᵀ / [G⁻¹]_kk

    Args:
        gradient: Γ `[m, n]`.
        a_times: Γ A `[m, n]`.
        g_times: G Γ `[m, n]`.
        a_inverse_diagonal: diagonal of the damped inverse of A, `[n]`.
        g_inverse_diagonal: diagonal of the damped inverse of G, `[m]`.

    Returns:
        Output importance `[m]` and input importance `[n]`.
    """
    inputs = (g_times * gradient).sum(0) / a_inverse_diagonal
    outputs = (a_times * gradient).sum(1) / g_inverse_diagonal
    return outputs, inputs


def paper_scores(outputs: Tensor, inputs: Tensor, block_size: int) -> Tensor:
    """Return the paper's block scores, `[ceil(m/b), ceil(n/b)]`, from importances `outputs [m]` and `inputs [n]`.

    They are the block sums of the outer product of the importances, computed without forming that `m x n` product.
    """
    return torch.outer(sum_groups(outputs, block_size), sum_groups(inputs, block_size))


def gain_scores(gradient: Tensor, a_blocks: Tensor, g_blocks: Tensor, damping: float) -> Tensor:
    """Return the gain of each block: the decrease per token from training it alone, half its Newton decrement.

        ½ tr(Γ_Bᵀ (G_BB + λ_G I)⁻¹ Γ_B (A_BB + λ_A I)⁻¹) = ½ ‖L⁻¹ Γ_B M⁻ᵀ‖²,   L Lᵀ = G_BB + λ_G I,  M Mᵀ = A_BB + λ_A I

    Args:
        gradient: Γ `[m, n]`, float64.
        a_blocks: the b x b diagonal blocks of A, `[ceil(n/b), b, b]`, zero beyond n.
        g_blocks: the b x b diagonal blocks of G, `[ceil(m/b), b, b]`, zero beyond m.
        damping: λ as a fraction of each factor's mean diagonal.

    Returns:
        The gains, `[ceil(m/b), ceil(n/b)]`.
    """
    (m, n), b = gradient.shape, a_blocks.shape[-1]
    mb, nb = grid_shape(gradient.shape, b)
    left = damped_cholesky(g_blocks, m, damping)
    right = damped_cholesky(a_blocks, n, damping)
    tiles = F.pad(gradient, (0, nb * b - n, 0, mb * b - m)).unflatten(0, (mb, b))
    half = torch.linalg.solve_triangular(left, tiles, upper=False)
    # [mb, b, nb, b] -> [nb, b, mb * b]: one solve per block column, on the inputs' side.
    half = half.unflatten(2, (nb, b)).permute(2, 3, 0, 1).flatten(2)
    whole = torch.linalg.solve_triangular(right, half, upper=False)
    scores: Tensor = 0.5 * whole.square().sum(1).unflatten(1, (mb, b)).sum(2).t()
    return scores


def damped_cholesky(blocks: Tensor, size: int, damping: float) -> Tensor:
    """Return the lower Cholesky factors of `blocks [k, b, b]`, λ added to their diagonals, `[k, b, b]`.

    The blocks are the diagonal blocks of a factor `[size, size]`. λ is `damping` times the factor's mean diagonal.
    Where a block is not positive definite with it, its λ is raised tenfold as often as needed, and the log says so.

    Raises:
        ArithmeticError: a block stays indefinite after 20 attempts, as blocks with values that are not finite do.
    """
    count, b = blocks.shape[0], blocks.shape[-1]
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    mean = (diagonal.sum() / size).clamp(min=torch.finfo(blocks.dtype).tiny)
    outside = torch.arange(count * b, device=blocks.device).view(count, b) >= size
    unit = torch.eye(b, dtype=blocks.dtype, device=blocks.device)
    padded = blocks + torch.diag_embed(outside.to(blocks.dtype) * mean)
    lam = torch.full((count, 1, 1), damping, dtype=blocks.dtype, device=blocks.device) * mean
    factor: Tensor
    for attempt in range(20):
        factor, info = torch.linalg.cholesky_ex(padded + lam * unit)
        failed = info != 0
        if not bool(failed.any()):
            return factor
        if attempt == 0:
            _say_once()
            log.info("%d of %d curvature blocks are not positive definite; damping is raised.", failed.sum(), count)
        lam = torch.where(failed[:, None, None], lam.clamp(min=1e-12 * mean) * 10, lam)
    raise ArithmeticError("a curvature block stays indefinite under any damping; are the activations finite?")


@functools.cache
def _say_once() -> None:
    """Warn once per process: a model has hundreds of weights, and truncation makes blocks of many indefinite."""
    log.warning(
        "Some curvature blocks are not positive definite; their damping is raised. Fewer num_partitions, a higher rank "
        "or a smaller block_size keep more of their curvature."
    )


def diagonal_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """Return the b x b blocks on the diagonal of `matrix [d, d]`: `[ceil(d/b), b, b]`, zero beyond d."""
    count = -(-matrix.shape[0] // block_size)
    extra = count * block_size - matrix.shape[0]
    padded = F.pad(matrix, (0, extra, 0, extra))
    tiles: Tensor = padded.unflatten(1, (count, block_size)).unflatten(0, (count, block_size))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
