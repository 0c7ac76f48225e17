"""`nm_linear`: a linear layer whose forward pass and input gradient use two masks of one weight.

    Y = X (W∘R)ᵀ,    gX = gY (W∘R∘C),    gW = gYᵀ X at the places of R          (SLoPe, arXiv 2405.16325)

It is one autograd Function, called by the module's own `forward`. Rewriting a graph would not do: after a graph break
between reading a weight and using it, nothing is left to rewrite, and the input gradient would be another one.
"""

from typing import Any

import torch
from torch import Tensor

from sylva_compile.kernels.nm_mm import nm_mm
from sylva_compile.kernels.nm_sample import nm_sample
from sylva_compile.kernels.nm_transpose import nm_transpose


class _NMLinear(torch.autograd.Function):
    """`x [T, in]` times the transposed weight; the weight's gradient is gathered at its kept places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, codes: Tensor, second: Tensor | None, n: int, m: int) -> Tensor:
        """Return `x (W∘R)ᵀ`, `[T, out]`."""
        ctx.save_for_backward(x, values, codes, second)
        ctx.pattern = n, m
        out: Tensor = nm_mm(x, values.to(x.dtype), codes, n, m, False)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, by the second mask if there is one, and of `values`."""
        x, values, codes, second = ctx.saved_tensors
        (gradient,) = gradients
        of_x = of_values = None
        if ctx.needs_input_grad[0] and second is None:
            of_x = nm_mm(gradient, values.to(gradient.dtype), codes, *ctx.pattern, True)
        elif ctx.needs_input_grad[0]:
            # Gathered anew in every backward pass, so that it can never be behind the values. Without accumulation that
            # costs as much as writing it after every step.
            packed = nm_transpose(values.to(gradient.dtype), codes, second, *ctx.pattern, gradient)
            of_x = nm_mm(gradient, packed, second, *ctx.pattern, False)
        if ctx.needs_input_grad[1]:
            of_values = nm_sample(gradient, x, codes, *ctx.pattern).to(values.dtype)
        return of_x, of_values, None, None, None, None


def nm_linear(
    x: Tensor, values: Tensor, codes: Tensor, pattern: tuple[int, int], second: Tensor | None = None
) -> Tensor:
    """Return `x (W∘R)ᵀ`, differentiable once.

    Args:
        x: `[..., in]`; products are computed in its dtype.
        values: `[out, in // m * n]`, float32 or wider.
        codes: their codes (`sylva_compile.kernels.nm_codes`).
        pattern: n and m of both masks.
        second: the codes of the second mask; None: the input gradient is exact.

    Returns:
        `[..., out]`, in the dtype of `x`.
    """
    out: Tensor = _NMLinear.apply(x.reshape(-1, x.shape[-1]), values, codes, second, *pattern)
    return out.reshape(*x.shape[:-1], values.shape[0])
