"""The linear layer of a quantised weight with blocks: W is the dequantised weight with the blocks written into it.

    Y = X Wᵀ,    gX = gY W,    g_blocks = gYᵀ X at the blocks

Compiled code uses `EmbedQuantised`: the products stay ordinary ones, which passes rewrite, and a pass lets the backward
half make W again. Uncompiled code uses `QuantisedLinear`, which makes W in each direction and saves X alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile.kernels.block_norms import block_norms
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.quantised.overwrite import overwrite


class EmbedQuantised(torch.autograd.Function):
    """The dequantised weight with the blocks written into it; the weight's gradient goes to the blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        dense: Tensor,
        blocks: Tensor,
        positions: Tensor,
        input_channels: Tensor,
        narrow_positions: Tensor,
        block_size: int,
        gate: Tensor | None,
        scores: Tensor | None,
        sketch: bool,
    ) -> Tensor:
        """Return a new `[m, n]`; `scores` is as for `blocks.embedded_module.Embed`."""
        ctx.save_for_backward(positions, input_channels, narrow_positions, gate)
        ctx.block_size, ctx.scored, ctx.sketch = block_size, scores is not None, sketch
        return overwrite(dense, blocks, positions, block_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sample the dense gradient `[m, n]` at the blocks; the dequantised weight gets none."""
        *tensors, gate = ctx.saved_tensors
        blocks = gather_blocks(gradients[0], *tensors, ctx.block_size, 1, gate)
        scores = block_norms(gradients[0], ctx.block_size, ctx.sketch) if ctx.scored else None
        return None, blocks, None, None, None, None, None, scores, None


class QuantisedLinear(torch.autograd.Function):
    """`x [..., n]` times the transposed weight, which `read` makes anew in each direction."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blocks: Tensor,
        bias: Tensor | None,
        read: Callable[[], Tensor],
        positions: Tensor,
        gate: Tensor | None,
        scores: Tensor | None,
    ) -> Tensor:
        """Return `[..., m]`; `read` returns W in the dtype of `x`."""
        # Blocks are saved so that autograd refuses a backward pass after a step; X is needed for their gradient alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks, positions, gate)
        ctx.read, ctx.scored = read, scores is not None
        return F.linear(x, read(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, the blocks and the bias."""
        x, blocks, positions, gate = ctx.saved_tensors
        (gradient,) = gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_blocks = of_bias = of_scores = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.read()
        if ctx.needs_input_grad[1]:
            dense = rows.t() @ x.reshape(-1, x.shape[-1])
            size = blocks.shape[-1]
            of_blocks = gather_blocks(dense, positions, positions[1], positions, size, 1, gate).to(blocks.dtype)
            of_scores = block_norms(dense, size, False) if ctx.scored else None
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_blocks, of_bias, None, None, None, of_scores
