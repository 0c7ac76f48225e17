"""The fine-tuning methods that a grid compares. Each prepares a model and lists the parameters that it trains."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from benchmarks.quality import adapters, blocks, layerwise, lora_layers, optimizers, peft_changes
from benchmarks.quality.optimizers import Groups
from benchmarks.quality.ready import Budgeted, Ready, Traced, besides_head, bytes_of, head_alone, state_bytes
from benchmarks.quality.tasks import head_of
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.schedules.layers import Policy

Prepare = Callable[[nn.Module, Mapping[str, Any], Budgeted, Traced, int], Ready]


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        prepare: takes the model, the method's options, the budget, a function that returns block scores, and the seed;
            returns the prepared model.
        has_budget: whether the method trains about `Budgeted.elements` besides the head.
        options: the names of the options that the grid may set besides `kind`; `sparsity` takes the place of the
            grid's.
    """

    prepare: Prepare
    has_budget: bool = True
    options: frozenset[str] = frozenset()

    def is_traced(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method, with these options, traces data before it trains."""
        return options.get("trace") in ("sylva", "kfac", "fisher")

    def has_rank(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method, with these options, uses the grid's `rank`."""
        return self.is_traced(options) or options.get("trace") == "lift"


def prepare_full(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning, which trains every parameter."""
    make = optimizers.for_dense(model, options)
    return Ready(model.requires_grad_(True), besides_head(model), lambda: state_bytes(model), make)


def prepare_linear(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning of the weights in scope, which is what blocks could train at most."""
    make = optimizers.for_dense(model, options)
    head_alone(model)
    trained = list(weights_in_scope(model, budget.scope).values())
    for weight in trained:
        weight.requires_grad_(True)
    return Ready(model, trained, lambda: state_bytes(model), make)


def prepare_layers(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare BAdam or LISA, which train whole layers, few at a time."""
    layers = layerwise.KINDS[options["kind"]](model, options, budget.scope, seed)
    return Ready(model, layers.trained, lambda: state_bytes(model), layers.optimizer, after_step=layers.step)


def prepare_sharded(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning with the optimizer's state sharded over the ranks.

    Without a process group, it makes one of this process alone.
    """
    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    ready = prepare_full(model, options, budget, traced, seed)

    def optimizer(groups: Groups) -> torch.optim.Optimizer:
        made = ZeroRedundancyOptimizer(groups[0]["params"], torch.optim.AdamW, lr=groups[0]["lr"], weight_decay=0.0)
        for group in groups[1:]:
            made.add_param_group(group)
        return made

    ready.optimizer = optimizer
    return ready


def prepare_head(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare training of the head alone, at the run's learning rate.

    Raises:
        ValueError: the model has no head.
    """
    if not head_of(model):
        raise ValueError("this model has no head; kind 'head' and head_steps are for classification")
    head_alone(model)
    return Ready(model, head_of(model), lambda: bytes_of(head_of(model)))


_OF_LAYERS = {"policy", "fraction"}

METHODS = {
    "full": Method(prepare_full, has_budget=False, options=optimizers.OPTIONS),
    "linear": Method(prepare_linear, has_budget=False, options=optimizers.OPTIONS),
    "sharded": Method(prepare_sharded, has_budget=False),
    "badam": Method(prepare_layers, has_budget=False, options=layerwise.OPTIONS - {"layers"}),
    "lisa": Method(prepare_layers, has_budget=False, options=layerwise.OPTIONS),
    "head": Method(prepare_head, has_budget=False),
    **dict.fromkeys(
        ("lora", "rslora", "dora", "shira"),
        Method(peft_changes.prepare, options=optimizers.OPTIONS | {"sparsity"} | _OF_LAYERS),
    ),
    "adapter": Method(adapters.prepare),
    "blocks": Method(blocks.prepare, options=optimizers.OPTIONS | blocks.OPTIONS | _OF_LAYERS),
}


def check_options(options: Mapping[str, Any]) -> str | None:
    """Return the error message for a method's table in a grid file, or None if the table is valid."""
    kind = options.get("kind")
    if kind not in METHODS:
        return f"kind={kind!r}; use one of {sorted(METHODS)}"
    strange = set(options) - {"kind"} - METHODS[kind].options
    if strange:
        return f"unknown options {sorted(strange)}; kind={kind!r} takes {sorted(METHODS[kind].options)}"
    if problem := optimizers.check(options):
        return problem
    if kind in layerwise.KINDS and (problem := layerwise.check(options)):
        return problem
    if problem := lora_layers.check(options):
        return problem
    if not 0 < options.get("sparsity", 0.5) < 1:
        return f"sparsity={options['sparsity']}; use the share of the blocks that stay frozen, between 0 and 1"
    if ("policy" in options) != ("fraction" in options):
        return "policy and fraction belong together: which layers are drawn, and what share of them"
    if "policy" in options and options["policy"] not in get_args(Policy):
        return f"policy={options['policy']!r}; use one of {get_args(Policy)}"
    return blocks.check(options) if kind == "blocks" else None
