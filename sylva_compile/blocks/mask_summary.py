"""The table of a model's masks that `Masks.summary` prints."""

from collections.abc import Mapping

from torch import nn

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.embed import block_states
from sylva_compile.kernels.blocks import grid_shape


def summary_of(masks: Mapping[str, BlockMask], model: nn.Module | None) -> str:
    """Return a table with a line for each weight, and the totals; `model` is the one that carries the masks."""
    width = max((len(name) for name in masks), default=6)
    lines = [f"{'weight':<{width}}  {'shape':>14}  {'blocks':>13}  {'trained':>8}"]
    total = trained = 0
    for name, mask in masks.items():
        size = mask.shape[0] * mask.shape[1]
        total, trained = total + size, trained + mask.trainable
        grid = grid_shape(mask.shape, mask.block_size)
        blocks = f"{mask.nnz}/{grid[0] * grid[1]}"
        shape = f"{mask.shape[0]} x {mask.shape[1]}"
        lines.append(f"{name:<{width}}  {shape:>14}  {blocks:>13}  {mask.trainable / max(size, 1):>8.2%}")
    share = trained / max(total, 1)
    lines.append(f"{len(masks)} weights, {trained:,} of {total:,} elements trained ({share:.2%}).")
    if model is not None:
        masked = {id(parameter) for name, parameter in model.named_parameters() if name in masks}
        masked |= {id(state.blocks) for state in block_states(model).values()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in masked]
        if others:
            count = sum(p.numel() for p in others)
            lines.append(f"{count:,} elements outside the masks require grad (biases, norms, heads, embeddings).")
    return "\n".join(lines)
