"""SLoPe's equations for one linear layer, dense, in float64, with masks by loops: what the tests hold pruned layers to.

Y = X (W∘R)ᵀ + bias + (X L Rt) / r,    gX = gY (W∘R∘C) + ((gY Rtᵀ) Lᵀ) / r,    gW = (gYᵀ X)∘R
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def mask_by_loops(keys: list[list[float]], n: int, m: int) -> Tensor:
    """Return the bool mask of the n largest of every m neighbours in a row; ties to the lower index."""
    mask = torch.zeros(len(keys), len(keys[0]), dtype=torch.bool)
    for i, row in enumerate(keys):
        for start in range(0, len(row), m):
            best = sorted(range(start, start + m), key=lambda j: (-row[j], j))[:n]
            for j in best:
                mask[i, j] = True
    return mask


def second_mask(weight: Tensor, first: Tensor, n: int, m: int) -> Tensor:
    """Return C: N:M along the outputs, by magnitude, where a zero inside of R is kept before a place outside."""
    keys = torch.where(first, weight.abs(), -1.0)
    return mask_by_loops(keys.t().tolist(), n, m).t()


@dataclass
class Adam:
    """The states of one matrix under AdamW, with the defaults of torch."""

    first: Tensor
    second: Tensor
    steps: int = 0

    def step(self, value: Tensor, gradient: Tensor, mask: Tensor, rate: float, decay: float) -> Tensor:
        """Return the value after a step of the masked elements."""
        self.steps += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean = self.first / (1 - 0.9**self.steps)
        spread = (self.second / (1 - 0.999**self.steps)).sqrt() + 1e-8
        return torch.where(mask, value * (1 - rate * decay) - rate * mean / spread, value)


@dataclass
class Twin:
    """One layer: `weight [out, in]` is dense and holds zeros outside of R."""

    weight: Tensor
    bias: Tensor | None
    n: int
    m: int
    double: bool = True
    left: Tensor | None = None
    right: Tensor | None = None
    states: dict[str, Adam] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.R = mask_by_loops(self.weight.abs().tolist(), self.n, self.m)
        self.weight = torch.where(self.R, self.weight, 0.0)
        self.left_mask: Tensor | None = None
        self.change()

    def change(self) -> None:
        self.C = second_mask(self.weight, self.R, self.n, self.m) if self.double else torch.ones_like(self.R)

    def add(self, left: Tensor, *, prune: bool) -> None:
        """Add an adapter with `left [in, r]`, as drawn."""
        self.left_mask = torch.ones_like(left, dtype=torch.bool)
        if prune:
            self.left_mask = mask_by_loops(left.abs().t().tolist(), self.n, self.m).t()
        self.left = torch.where(self.left_mask, left, 0.0)
        self.right = torch.zeros(left.shape[1], self.weight.shape[0], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.t()
        if self.bias is not None:
            out = out + self.bias
        if self.left is not None and self.right is not None:
            out = out + x @ self.left @ self.right / len(self.right)
        return out

    def backward(self, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
        """Return the gradients of x, the weight and the adapter for `x [T, in]` and `gy [T, out]`."""
        found = {"x": gy @ torch.where(self.C, self.weight, 0.0), "weight": torch.where(self.R, gy.t() @ x, 0.0)}
        if self.left is not None and self.right is not None:
            rank = len(self.right)
            found["x"] = found["x"] + gy @ self.right.t() @ self.left.t() / rank
            found["left"] = torch.where(self.left_mask, x.t() @ gy @ self.right.t() / rank, 0.0)
            found["right"] = (x @ self.left).t() @ gy / rank
        return found

    def step(self, gradients: dict[str, Tensor], rate: float, decay: float) -> None:
        """Take a step of AdamW on the weight and the adapter."""
        masks = {"weight": self.R, "left": self.left_mask, "right": None}
        for name, mask in masks.items():
            value = getattr(self, name)
            if value is None:
                continue
            where = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
            state = self.states.setdefault(name, Adam(torch.zeros_like(value), torch.zeros_like(value)))
            setattr(self, name, state.step(value, gradients[name], where, rate, decay))
