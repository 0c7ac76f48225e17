"""`changed_values`: what training has changed, as flat indices and values, for a server that holds the base."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sylva_compile.adapters.disabling import check_embedded
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import named_weights
from sylva_compile.errors import AdapterError
from sylva_compile.kernels.blocks import grid_shape

_MOST_ELEMENTS = 1 << 31
"""The elements that indices of 32 bits reach."""


def changed_values(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Return an iterator over the places of `model` that were trained so far, a weight at a time.

    Written onto a fresh base, the values make the trained masked weights, bit for bit. All places where blocks have
    ever been are there, those included that happen to hold their base value; after `set_adapter`, those of the active
    adapter, so send the places of the one before as well. Parameters that are trained beside blocks, or that an adapter
    replaced whole, are not.

    vLLM takes such triples (backend "sparse_nccl", pull requests 40096 and 53751) as patches in the coordinates of a
    checkpoint: `SparseWeightPatch(name=name, indices=indices, values=values, full_shape=tuple(shape))`, where `shape`
    is that of `model.get_parameter(name)`. It marks elements to keep by NaN, so values must not be NaN. Experts come as
    the model stacks them, `[E, m, n]`, while the checkpoints of most models hold them one by one under other names.

    Yields:
        `(name, indices, values)`. `name` is the weight's in `model.state_dict()`, without the parts that wrappers put
        into it; a weight with several names comes once, under the first, as in the files of transformers. `indices
        int32[k]` point into the flattened weight, strictly ascending. `values [k]` have the weight's dtype. Both are
        contiguous copies on the weight's device.

    Raises:
        AdapterError: the model carries no blocks, a weight is quantised, or one has more than 2³¹ elements.
        EmbedError: a base is not known any more, or `disable_adapter` shows it. All errors come from this call, before
            anything is yielded.
    """
    states = block_states(model)
    check_embedded(states)
    for name, state in states.items():
        state.check_enabled()
        state.sync()
        state.check_base_known()
        if state.is_quantised:
            raise AdapterError(
                f"{name} is quantised, and values cannot be written into a packed weight; send the file that "
                "save_adapter writes, or call merge_and_unload(model, dequantise=True) first."
            )
        if state.weight.numel() > _MOST_ELEMENTS:
            raise AdapterError(
                f"{name} has {state.weight.numel():,} elements, more than 32-bit indices reach; send the whole weight."
            )
    first_names = {id(weight): name for name, weight in reversed(named_weights(model).items())}
    return _triples({first_names[id(state.weight)]: state for state in states.values()})


def _triples(states: Mapping[str, BlockState]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, state in states.items():
        positions = state.originals.places.to(state.weight.device)
        values = state.originals.copier(state.weight).read()
        yield name, *_flat(positions, values, state.mask.shape)


def _flat(positions: Tensor, blocks: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the flat indices of `blocks [k, b, b]` at `positions int64[2, k]`, ascending, and their values.

    Elements beyond the edges of a weight of `shape` are left out.
    """
    b, (m, n) = blocks.shape[-1], shape
    lane = torch.arange(b, device=blocks.device)
    # A row of a block lies in one piece in memory: these pieces are sorted, and not their elements.
    rows = (positions[0][:, None] * b + lane).flatten()
    cols = positions[1].repeat_interleave(b)
    order = (rows * grid_shape(shape, b)[1] + cols).argsort()
    order = order[rows[order] < m]
    rows, cols = rows[order], cols[order] * b
    indices = (rows * n + cols).to(torch.int32)[:, None] + lane.to(torch.int32)
    values = blocks.flatten(0, 1).index_select(0, order)
    if n % b == 0:
        return indices.flatten(), values.flatten()
    inside = cols[:, None] + lane < n
    return indices[inside], values[inside]
