"""`Muon`, which steps blocks as matrices, and other parameters by rules for elements."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.lowering import Rule
from sylva_compile.optim import rules
from sylva_compile.optim.optimizer import GeneratedOptimizer
from sylva_compile.optim.optimizers import SGD, Adam, AdamW, Lion

_FOR_ELEMENTS: dict[str, Callable[..., GeneratedOptimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "lion": Lion}


class Muon(GeneratedOptimizer):
    """Muon (Jordan et al., 2024) over blocks: each block is stepped as a matrix, along its orthogonalised momentum.

    It takes the steps of `torch.optim.Muon` with one 2-D parameter for each block, in float32 where torch multiplies in
    bfloat16, and keeps one state, `momentum_buffer`. Parameters are blocks `[nnz, b, b]`, such as `masks.parameters()`.
    Where a block reaches over the edge of its weight, the part inside is the matrix.

    Other parameters (norms, biases, a head) go into param groups with a `rule` for elements:

        Muon([{"params": masks.parameters()}, {"params": head.parameters(), "rule": "adamw", "lr": 1e-3}])

    `rule` is "adamw", "adam", "sgd" or "lion". Such a group takes the options of the optimizer of that name, with its
    defaults; only the learning rate is Muon's unless it is given. Groups that name no rule have "muon".

    Weight decay defaults to 0, as in our AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        **options: Any,
    ) -> None:
        """Take the options of `torch.optim.Muon`, and of `StepOptions`.

        Args:
            params: blocks, or param groups.
            lr: the learning rate.
            weight_decay: decoupled weight decay.
            momentum: the share of the old momentum in the new one. With 0 there is no momentum, and blocks have no
                state at all.
            nesterov: look ahead along the momentum.
            ns_coefficients: a, b and c of the Newton–Schulz iteration `X ← aX + bXXᵀX + c(XXᵀ)²X`.
            eps: the least norm by which a momentum is divided.
            ns_steps: the number of iterations.
            adjust_lr_fn: "match_rms_adamw" multiplies a step by `0.2 * sqrt(max(height, width))` of the block. This
                gives its elements the size of AdamW's steps, so that one learning rate serves both, for every block
                size. "original" multiplies by `sqrt(max(1, height / width))`.
            options: of `StepOptions`.

        Raises:
            ArgumentError: an option is out of its range, or a parameter of rule "muon" holds no square blocks.
        """
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Groups of AdamW and of torch's Muon have no rule, and older ones lack options.
            group.setdefault("rule", "muon")
            for name, value in self._defaults_of(group["rule"]).items():
                group.setdefault(name, value)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule of `group`; see `GeneratedOptimizer.rule`.

        Raises:
            ArgumentError: `group` names no rule that there is, or an option of Muon is out of its range.
        """
        if group["rule"] != "muon":
            return _for_elements(group["rule"]).rule(group)
        _check_options(group)
        return rules.muon(
            momentum=group["momentum"] > 0,
            nesterov=bool(group["nesterov"]),
            ns_steps=group["ns_steps"],
            scaled=group["adjust_lr_fn"] == "match_rms_adamw",
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; `rule` names the group's rule.

        Raises:
            ArgumentError: `rule` is unknown, an option is out of its range or of another rule, or a parameter cannot be
                stepped by the rule.
        """
        name = param_group.get("rule", "muon")
        own = self._defaults_of(name)
        foreign = self.defaults.keys() | {option for each in _FOR_ELEMENTS for option in _for_elements(each).defaults}
        if strange := param_group.keys() & foreign - own.keys():
            raise ArgumentError(f"{min(strange)} is no option of the rule {name!r}; leave it out of that param group.")
        if name != "muon":
            given = {option: param_group[option] for option in own.keys() & param_group.keys() if option != "rule"}
            try:
                # The optimizer of that name checks its options.
                _FOR_ELEMENTS[name]([nn.Parameter(torch.empty(0))], **given)
            except ValueError as error:
                raise ArgumentError(f"{error}; change that option of the param group.") from error
        defaults, self.defaults = self.defaults, {}
        try:
            # With no defaults, torch gives the group no options of another rule.
            super().add_param_group({**own, **param_group})
        finally:
            self.defaults = defaults

    def _defaults_of(self, name: str) -> dict[str, Any]:
        """Return the options of a group of rule `name`, with their defaults."""
        own = self.defaults if name == "muon" else _for_elements(name).defaults
        return {**own, "rule": name, "lr": self.defaults["lr"]}


@functools.cache
def _for_elements(name: str) -> GeneratedOptimizer:
    """Return an optimizer that knows the rule `name` and its options; it steps nothing."""
    if name not in _FOR_ELEMENTS:
        raise ArgumentError(f"rule={name!r}; use 'muon' or one of {sorted(_FOR_ELEMENTS)}.")
    return _FOR_ELEMENTS[name]([nn.Parameter(torch.empty(0))])


def _check_options(group: Mapping[str, Any]) -> None:
    """Raise ArgumentError if an option of Muon is out of its range."""
    for name in ("lr", "weight_decay"):
        # A learning rate on a GPU is not looked at: that would wait for the device.
        value = group[name]
        if not (isinstance(value, Tensor) and value.is_cuda) and not 0 <= float(value) < math.inf:
            raise ArgumentError(f"{name}={value}; give a number that is not negative.")
    if not 0 <= float(group["momentum"]) < 1:
        raise ArgumentError(f"momentum={group['momentum']}; give a number from 0 to 1, without 1.")
    if not 0 < group["eps"] < math.inf:
        raise ArgumentError(f"eps={group['eps']}; give a positive number.")
    if len(group["ns_coefficients"]) != 3 or not all(map(math.isfinite, group["ns_coefficients"])):
        raise ArgumentError(f"ns_coefficients={group['ns_coefficients']}; give three numbers.")
    if not isinstance(group["ns_steps"], int) or not 1 <= group["ns_steps"] < 100:
        raise ArgumentError(f"ns_steps={group['ns_steps']}; give a whole number from 1 to 99.")
    if group["adjust_lr_fn"] not in ("match_rms_adamw", "original"):
        raise ArgumentError(f"adjust_lr_fn={group['adjust_lr_fn']!r}; use 'match_rms_adamw' or 'original'.")
