"""Blocks as a `Kind` of embedded weights."""

from torch import Tensor, nn

from sylva_compile.blocks import registry
from sylva_compile.blocks.embed import block_states, unembed
from sylva_compile.blocks.masks import Masks
from sylva_compile.embedded.kind import Kind


def carriers(model: nn.Module) -> dict[str, Tensor]:
    """Return the dense weights of `model` that carry blocks, by weight name."""
    return {name: state.weight for name, state in block_states(model).items()}


def _is_carried(tensor: Tensor) -> bool:
    return registry.state_of_weight(tensor) is not None


BLOCKS = Kind(Masks, carriers, _is_carried, unembed)
