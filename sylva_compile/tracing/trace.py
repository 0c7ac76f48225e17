"""`trace_and_mask`: run a model over some batches, estimate the curvature of every weight, choose its blocks."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sylva_compile.blocks.block_mask import BlockMask, check_block_fits
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.fingerprint import base_fingerprint
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.quantised_base import check_can_carry, quantised_base, tensors_of_bases
from sylva_compile.blocks.scope import input_axis, owners_of, unwrap, weights_in_scope
from sylva_compile.blocks.shards import compute_device, reshard
from sylva_compile.blocks.share_left_out import log_share_left_out
from sylva_compile.config import SylvaConfig, takes_config
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import ArgumentError, EmbedError, TraceError
from sylva_compile.kernels.blocks import matrix_shape
from sylva_compile.lost_ranks import naming_lost_ranks
from sylva_compile.quantised.registry import shape_of
from sylva_compile.tracing.batches import LossFn
from sylva_compile.tracing.memory import TraceEstimate, estimate_bytes
from sylva_compile.tracing.ranks import same_on_all_ranks
from sylva_compile.tracing.scoring import score_by_tracing, score_without_data
from sylva_compile.tracing.selection import check_column_budget, select_blocks
from sylva_compile.tracing.sharded import check_no_experts, sharing_processes
from sylva_compile.version import __version__

log = logging.getLogger(__name__)


@takes_config
@naming_lost_ranks("the trace", "start all processes again; with `checkpoint` they go on from there")
def trace_and_mask(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    config: SylvaConfig | None = None,
    *,
    loss_fn: LossFn | None = None,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> Masks:
    """Choose the blocks of each weight that are worth training.

    The model runs forward and backward over batches of `loader` in evaluation mode (no dropout), compiled by a backend
    that shows every weight gradient's operands to an estimator. It is left as it was found: mode, `requires_grad`,
    gradients, hooks, random state. `estimate` tells how much memory the estimators hold meanwhile.

    Args:
        model: the model to fine-tune, in memory, not yet embedded.
        loader: batches; None with "magnitude", "lift" and "random". A mapping is called as `model(**batch).loss`.
        config: the settings; None: the defaults of SylvaConfig.
        loss_fn: `loss_fn(model, batch) -> scalar`, for batches that are no mappings or models without `.loss`. As
            `.loss`, it is taken for a mean over the batch.
        process_group: every rank traces its share of the samples, and all end with the same masks. For a model that
            `fully_shard` has split, all ranks that hold a part of it if left out.
        **options: fields of SylvaConfig, in place of those in `config`.

    Returns:
        Masks bound to `model`, in the model's order of weights.

    Raises:
        ArgumentError, ScopeError: an argument, or a weight in scope, cannot be used.
        EmbedError: the model carries blocks already.
        TraceError: no batches, no loss, a loss that is not finite or reaches no weight in scope, too little memory, or
            a checkpoint of another trace.
        LostRankError: another process of `process_group` has ended.
    """
    config, model = SylvaConfig.resolve(config, options), unwrap(model)
    weights, specs = _weights_to_trace(model, config)
    split_over = sharing_processes(weights, process_group)
    if split_over is not None and config.needs_data:
        check_no_experts(specs)
    process_group = process_group or split_over
    log_share_left_out(model, weights)
    # A budget without room is refused here, not after the trace.
    check_column_budget(specs, config)
    groups = {"group": process_group, "split_over": split_over}
    scored = (
        score_by_tracing(model, weights, specs, loader, config, loss_fn=loss_fn, **groups)
        if config.needs_data
        else score_without_data(model, weights, config)
    )
    if not scored.scores:
        raise TraceError("The loss has a gradient of zero in every weight in scope; check it, and layers of zeros.")
    maps = select_blocks(scored.scores, config, specs, scored.choose)
    masks = _bound_masks(model, weights, same_on_all_ranks(maps, process_group), config)
    scored.finish()
    return masks


@takes_config
def estimate(model: nn.Module, config: SylvaConfig | None = None, **options: Any) -> TraceEstimate:
    """Estimate the bytes that `trace_and_mask` with these settings will hold beside the model; prints as a table.

    Args:
        model: the model to trace.
        config: the settings; None: the defaults of SylvaConfig.
        **options: fields of SylvaConfig, in place of those in `config`.

    Returns:
        The bytes of every weight, and `at_least()` and `at_most()` for each device.

    Raises:
        ArgumentError, ScopeError: an argument, or a weight in scope, cannot be used, or the method traces nothing.
        EmbedError: the model carries blocks already.

    All processes of a model that `fully_shard` has split call it.
    """
    config = SylvaConfig.resolve(config, options)
    weights, specs = _weights_to_trace(unwrap(model), config)
    if not config.needs_data:
        raise ArgumentError(f"method={config.method!r} traces nothing and holds nothing; there is nothing to estimate.")
    split_over = sharing_processes(weights, None)
    if split_over is not None:
        check_no_experts(specs)
    return estimate_bytes(specs, config, split_over=split_over)


def _weights_to_trace(model: nn.Module, config: SylvaConfig) -> tuple[dict[str, nn.Parameter], dict[str, WeightSpec]]:
    """Return the weights in scope by name, and the description of each for estimators."""
    if block_states(model):
        raise EmbedError(
            "The model carries blocks already; call merge_and_unload(model) to keep their values, or save_adapter and "
            "unload_adapter(model) to go back to the base, before tracing."
        )
    reshard(model)
    weights = weights_in_scope(model, config.scope)
    check_block_fits(config.block_size, {name: shape_of(weight) for name, weight in weights.items()})
    check_can_carry(model, weights, config.block_size)
    if config.expert_budget == "expert" and not any(weight.dim() == 3 for weight in weights.values()):
        raise ArgumentError("expert_budget='expert', and no stacked experts are in scope; leave it out.")
    return weights, weight_specs(model, weights)


def weight_specs(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, WeightSpec]:
    """Describe `weights` of `model`, by name, for estimators."""
    axes = {name: input_axis(next(iter(owners_of(model, weight)))[0]) for name, weight in weights.items()}
    specs = {name: _spec(model, name, weight, axes[name]) for name, weight in weights.items()}
    return {name: dataclasses.replace(spec, device=compute_device(weights[name])) for name, spec in specs.items()}


def _spec(model: nn.Module, name: str, weight: Tensor, axis: int) -> WeightSpec:
    base = quantised_base(model, weight)
    if base is None:
        return WeightSpec.of(name, weight, axis)
    packed = sum(tensor.numel() * tensor.element_size() for tensor in base.tensors().values())
    return WeightSpec(name, base.shape, base.format.dtype(weight), weight.device, axis, packed=packed)


def _bound_masks(
    model: nn.Module, weights: Mapping[str, Tensor], maps: Mapping[str, Tensor], config: SylvaConfig
) -> Masks:
    """Make the masks of block maps, with the settings, versions and base that they come from."""
    blocks = {
        name: BlockMask.from_block_map(chosen, matrix_shape(shape_of(weights[name])), config.block_size)
        for name, chosen in maps.items()
    }
    origin = {
        **config.provenance(),
        "versions": {"torch": torch.__version__, "sylva-compile": __version__},
        "base": base_fingerprint(tensors_of_bases(model, (weights[name] for name in blocks))),
    }
    masks = Masks(blocks, model=model, config=origin)
    trained = sum(mask.trainable for mask in blocks.values()) / sum(math.prod(mask.shape) for mask in blocks.values())
    if trained > 1.5 * (1 - config.sparsity):
        log.warning(
            "%.1f%% of the elements are trained where sparsity=%g asks for %.1f%%, since every weight trains one "
            "block; use a smaller block_size, or allocation='global'.",
            100 * trained,
            config.sparsity,
            100 * (1 - config.sparsity),
        )
    return masks
