"""Optimizers with the constructors, options and checkpoints of torch's, stepped by generated kernels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.lowering import Rule
from sylva_compile.optim import rules
from sylva_compile.optim.optimizer import GeneratedOptimizer


class AdamW(GeneratedOptimizer, torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019) over float32 blocks and any other parameters.

    It keeps the states and takes the steps of `torch.optim.AdamW`, and checkpoints of either load into the other.
    Weight decay defaults to 0: blocks are the weights themselves, and decay would pull a pre-trained model to zero.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.0, **options: Any
    ) -> None:
        """Take `options` of `torch.optim.AdamW` and of `StepOptions`."""
        rest = self._take_options(options)
        torch.optim.AdamW.__init__(self, params, lr=lr, weight_decay=weight_decay, **rest)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`."""
        return rules.adam(decoupled=True, amsgrad=bool(group["amsgrad"]), maximize=bool(group["maximize"]))


class Adam(GeneratedOptimizer, torch.optim.Adam):
    """Adam (Kingma and Ba, 2015), with the states and steps of `torch.optim.Adam`."""

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-3, **options: Any) -> None:
        """Take `options` of `torch.optim.Adam` and of `StepOptions`."""
        rest = self._take_options(options)
        torch.optim.Adam.__init__(self, params, lr=lr, **rest)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`."""
        decoupled = bool(group["decoupled_weight_decay"])
        return rules.adam(decoupled=decoupled, amsgrad=bool(group["amsgrad"]), maximize=bool(group["maximize"]))


class SGD(GeneratedOptimizer, torch.optim.SGD):
    """SGD with momentum, dampening and Nesterov's momentum, with the states and steps of `torch.optim.SGD`."""

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-3, **options: Any) -> None:
        """Take `options` of `torch.optim.SGD` and of `StepOptions`."""
        rest = self._take_options(options)
        torch.optim.SGD.__init__(self, params, lr=lr, **rest)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`."""
        momentum = group["momentum"] != 0
        return rules.sgd(
            momentum=momentum,
            dampening=momentum and group["dampening"] != 0,
            nesterov=momentum and bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
        )


class RMSprop(GeneratedOptimizer, torch.optim.RMSprop):
    """RMSprop, centered or not, with or without momentum, with the states and steps of `torch.optim.RMSprop`."""

    counts_steps = True

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-2, **options: Any) -> None:
        """Take `options` of `torch.optim.RMSprop` and of `StepOptions`."""
        rest = self._take_options(options)
        torch.optim.RMSprop.__init__(self, params, lr=lr, **rest)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`."""
        return rules.rmsprop(
            momentum=group["momentum"] > 0, centered=bool(group["centered"]), maximize=bool(group["maximize"])
        )


class Lion(GeneratedOptimizer):
    """Lion (Chen et al., 2023), which steps by the sign of an interpolated momentum and keeps one state."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        """Take `options` of `StepOptions`; raise ArgumentError for a negative number or a beta of 1 or more."""
        if float(lr) < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ArgumentError(
                f"lr={lr}, betas={betas}, weight_decay={weight_decay}; none may be negative, and betas are below 1."
            )
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`."""
        return rules.lion(maximize=bool(group["maximize"]))
