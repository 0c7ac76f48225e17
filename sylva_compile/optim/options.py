"""`StepOptions`: what every generated optimizer can do beside its rule."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.table import Products
from sylva_compile.running_calls import is_inside_zero_optimizer


@dataclass(frozen=True)
class StepOptions:
    """The options of every generated optimizer, beside those of its rule.

    Attributes:
        max_grad_norm: clip the norm of all gradients together, as `clip_grad_norm_` does just before the step, but
            inside of it: `.grad` stays as it is, and the norm is kept in `optimizer.grad_norm`.
        nonfinite: how a step treats NaN or infinity in any gradient. "ignore" lets them through, as torch does; "skip"
            changes nothing, step counts included; "raise" changes nothing and raises GradientError, and waits for a
            GPU to know.
        state_dtype: float32 or bfloat16 states, whatever the parameters are. bfloat16 is rounded stochastically, the
            same way on any device and number of threads. None makes them in the parameter's dtype, as torch does.
        seed: of the stochastic rounding, 0 to 2³² - 1.
        products: the precision of the factors of matrix products on a GPU, for rules over blocks. "tf32" and "bfloat16"
            keep fewer digits. Sums are float32 in any case. Blocks larger than 128 are multiplied by
            torch, whose own settings say whether float32 is TF32. The CPU always multiplies in float32.
    """

    max_grad_norm: float | None = None
    nonfinite: Literal["ignore", "skip", "raise"] = "ignore"
    state_dtype: torch.dtype | None = None
    seed: int = 0
    products: Products = "float32"

    def __post_init__(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ArgumentError(f"max_grad_norm={self.max_grad_norm}; give a positive number, or None not to clip.")
        if self.nonfinite not in ("ignore", "skip", "raise"):
            raise ArgumentError(f"nonfinite={self.nonfinite!r}; use 'ignore', 'skip' or 'raise'.")
        if self.state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ArgumentError(f"state_dtype={self.state_dtype}; use torch.float32, torch.bfloat16 or None.")
        if not 0 <= self.seed < 1 << 32:
            raise ArgumentError(f"seed={self.seed}; use an integer from 0 to 2**32 - 1.")
        if (self.max_grad_norm is not None or self.nonfinite != "ignore") and is_inside_zero_optimizer():
            raise ArgumentError(
                "ZeroRedundancyOptimizer gives each process a part of the gradients, and max_grad_norm and nonfinite "
                "are about all of them; leave them out, and call torch.nn.utils.clip_grad_norm_ before the step."
            )
        if self.products not in get_args(Products):
            raise ArgumentError(f"products={self.products!r}; use 'float32', 'tf32' or 'bfloat16'.")
