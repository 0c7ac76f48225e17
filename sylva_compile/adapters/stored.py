"""`Adapters`: the adapters that a model has by name; one of them is active, the others are stored beside the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sylva_compile.adapters.other_tensors import named_tensors, replaced_tensors
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.blocks.scope import unwrap
from sylva_compile.blocks.shards import whole as values_of

DEFAULT = "default"
"""The name of an adapter that nobody has named; PEFT's word."""


@dataclass
class StoredWeight:
    """The part of an adapter that belongs to one weight.

    Attributes:
        mask: where its blocks are.
        blocks: `[nnz, b, b]`, their values.
        left: `int64[2, k]` on the CPU, the other places that it trained.
        left_values: `[k, b, b]`, the weight's values there; None if there are none.
        base: the checksum of the weight before training; None where only its number is known.
        base_id: `BlockState.base_id` of the weight that it was trained on; 0 where only the checksum is known.
    """

    mask: BlockMask
    blocks: Tensor
    left: Tensor
    left_values: Tensor | None
    base: str | None
    base_id: int = 0


@dataclass
class StoredAdapter:
    """An adapter outside of the weights.

    Attributes:
        weights: what it holds of every masked weight, by the weight's name.
        whole: the tensors that it replaces whole, by name.
        config: `Masks.config` of its masks.
    """

    weights: dict[str, StoredWeight]
    whole: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, states: Mapping[str, BlockState]) -> "StoredAdapter":
        """Copy the active adapter of `model`, whose embedded weights are `states`, synced."""
        weights = {}
        for name, state in states.items():
            left, values = state.left_behind()
            blocks = state.whole_blocks().clone()
            weights[name] = StoredWeight(state.mask, blocks, left, values, None, state.base_id)
        replaced = replaced_tensors(model)
        every = named_tensors(model) if replaced else {}
        whole = {name: values_of(every[name]).clone() for name in replaced}
        return cls(weights, whole, dict(next(iter(states.values())).masks_config))


@dataclass
class Adapters:
    """The adapters of a model.

    Attributes:
        active: the name of the one whose values are in the weights.
        all: every adapter by name, in the order in which they came; None for the active one.
    """

    active: str
    all: dict[str, StoredAdapter | None]

    @property
    def stored(self) -> dict[str, StoredAdapter]:
        """The adapters that are not active, by name."""
        return {name: adapter for name, adapter in self.all.items() if adapter is not None}


_KEPT_AS = "_sylva_adapters"


def adapters_of(model: nn.Module) -> Adapters | None:
    """Return the adapters of `model`; None if it carries no blocks."""
    model = unwrap(model)
    if not block_states(model):
        return None
    found: Adapters = model.__dict__.setdefault(_KEPT_AS, Adapters(DEFAULT, {DEFAULT: None}))
    return found


def name_the_active(model: nn.Module, name: str) -> None:
    """Give the one adapter of `model` a name."""
    unwrap(model).__dict__[_KEPT_AS] = Adapters(name, {name: None})


def forget_adapters(model: nn.Module) -> None:
    """Forget all adapters of `model`, whose blocks have left it."""
    unwrap(model).__dict__.pop(_KEPT_AS, None)


def make_room(states: Mapping[str, BlockState], adapters: Adapters) -> None:
    """Keep room in the layouts of `states` for the input channels of every stored adapter that may take their place."""
    for name, state in states.items():
        state.layout.others = {
            key: adapter.weights[name].mask
            for key, adapter in adapters.stored.items()
            if name in adapter.weights and fits_in_place(state, adapter.weights[name])
        }
    update_input_channels(state.layout for state in states.values())


def states_by_weight(states: Mapping[str, BlockState]) -> dict[int, BlockState]:
    """Return the states by the `id` of their dense weight, which a shared weight has under all of its names."""
    return {id(state.weight): state for state in states.values()}


def fits_in_place(state: BlockState, stored: StoredWeight) -> bool:
    """Whether the blocks of `stored` are as many and as large as those of `state`."""
    return (state.mask.nnz, state.mask.block_size) == (stored.mask.nnz, stored.mask.block_size)
