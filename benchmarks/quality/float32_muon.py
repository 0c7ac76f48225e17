"""`Float32Muon`: torch's Muon with float32 products, for CPUs that have no instructions for bfloat16."""

import math
from typing import Any

import torch
from pytorch_optimizer.optimizer.utils import zero_power_via_gram_newton_schulz


class Float32Muon(torch.optim.Muon):
    """Takes the steps of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and no decay, in float32.

    torch's own products are in bfloat16 whatever the weights are; on a CPU without such instructions they take tens of
    times as long. Float32 is also what our Muon takes for blocks. The Newton-Schulz iteration runs on the Gram matrix,
    which is less work for long matrices.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95) -> None:
        """Take matrices; the learning rate and the momentum are Muon's."""
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every matrix that has a gradient."""
        assert closure is None, "the training loop has none"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, momentum = self.state[matrix], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                orthogonal = zero_power_via_gram_newton_schulz(
                    matrix.grad.lerp(state["momentum_buffer"], momentum),
                    num_steps=group["ns_steps"],
                    eps=group["eps"],
                    weights=group["ns_coefficients"],
                    dtype=torch.float32,
                    reset_steps=(),
                )
                matrix.add_(orthogonal, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))
