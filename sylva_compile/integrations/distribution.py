"""Checks of how accelerate would split a model that carries blocks over processes.

DistributedDataParallel keeps every weight whole, and FSDP2 (`fully_shard`) splits each one by itself: blocks follow
both. DeepSpeed and FSDP1 lay many weights end to end in buffers of their own, where no block is found any more.
"""

from typing import Any

from sylva_compile.errors import ArgumentError


def check_distribution(accelerator: Any) -> None:
    """Raise ArgumentError where `accelerator`, an `accelerate.Accelerator`, would split weights past their blocks."""
    state = accelerator.state
    if getattr(state, "deepspeed_plugin", None) is not None:
        raise ArgumentError(
            "DeepSpeed lays weights and gradients into buffers of its own, where blocks are not found; use "
            "DistributedDataParallel, or FSDP2 (TrainingArguments(fsdp=True), fsdp_version=2 of accelerate's plugin)."
        )
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ArgumentError(
            "FSDP1 lays weights into flat buffers, where blocks are not found; use FSDP2: fsdp_config={'version': 2} "
            "of TrainingArguments, fsdp_version=2 of accelerate's plugin."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ArgumentError(
            "cpu_ram_efficient_loading=True loads dense weights into a model without values, and blocks are no part of "
            "them; set cpu_ram_efficient_loading to False."
        )


def check_fsdp2_arguments(args: Any, optimizer: object, scheduler: object) -> None:
    """Raise ArgumentError where a Trainer under FSDP2 is given what it cannot use.

    Args:
        args: the TrainingArguments.
        optimizer: what the Trainer was given, or None.
        scheduler: likewise.
    """
    if optimizer is not None or scheduler is not None:
        raise ArgumentError(
            "optimizers=... holds parameters from before FSDP2 splits the model; give optimizer_cls_and_kwargs="
            "(sylva_compile.AdamW, {'lr': 1e-3}), and the schedule by TrainingArguments(lr_scheduler_type=...)."
        )
    if args.save_on_each_node:
        raise ArgumentError(
            "save_on_each_node=True: under FSDP2 one process writes the adapter for all; leave it out, and give an "
            "output_dir that all nodes share."
        )
