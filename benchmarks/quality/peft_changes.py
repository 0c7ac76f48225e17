"""PEFT's LoRA, rsLoRA, DoRA and SHiRA."""

from collections.abc import Mapping, Sequence
from typing import Any

import peft
from torch import nn

from benchmarks.quality import lora_layers, optimizers
from benchmarks.quality.ready import Budgeted, Ready, Traced, bytes_of
from benchmarks.quality.tasks import Batch, head_of
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.tracing.trace import weight_specs


def prepare(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare PEFT's LoRA, rsLoRA, DoRA or SHiRA on every weight in scope, at the rank nearest to the budget.

    With `policy`, the change of a few layers trains at a time.
    """
    kind = options["kind"]
    weights = weights_in_scope(model, budget.scope)
    # LoRA adds r(m + n) elements per weight, SHiRA trains as many of the weight itself, DoRA adds m magnitudes more.
    specs = weight_specs(model, weights).values()
    magnitudes = sum(spec.outputs for spec in specs) if kind == "dora" else 0
    per_rank = sum(sum(weight.shape) for weight in weights.values())
    rank = max(1, round((budget.elements(model) - magnitudes) / per_rank))
    targets = [name.removesuffix(".weight") for name in weights]
    # PEFT wraps the layers in place: in `model`, under the wrapper, the names of the head stay the same.
    config = (
        peft.ShiraConfig(r=rank, target_modules=targets, random_seed=seed)
        if kind == "shira"
        else peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=targets,
            use_dora=kind == "dora",
            use_rslora=kind == "rslora",
            # GPT-2's layers store their weights transposed.
            fan_in_fan_out=all(spec.input_axis == 0 for spec in specs),
        )
    )
    wrapped = peft.get_peft_model(model, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    head = head_of(model)
    for parameter in head:
        parameter.requires_grad_(True)
    make = optimizers.for_dense(model, options)
    schedules: list[lora_layers.LoraLayers] = []

    def begin(batches: Sequence[Batch]) -> None:
        # It leaves most of the change without a gradient, so it comes after the optimizer.
        if "policy" in options:
            schedules.append(lora_layers.LoraLayers(wrapped, options, seed, batches))

    def after_step() -> None:
        for schedule in schedules:
            schedule.step()

    return Ready(wrapped, trained, lambda: bytes_of([*trained, *head]), make, begin=begin, after_step=after_step)
