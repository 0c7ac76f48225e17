"""How much training changed each block of each weight."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.blocks import grid_shape
from sylva_compile.reports.weight_names import Place, places_of


@dataclass(frozen=True)
class WeightChange:
    """The change of one weight since its blocks were embedded.

    Attributes:
        name: the weight's name.
        stack: the words of its name that tell its layers from those of another stack, "encoder"; "" if there is one.
        layer: the first number in its name; None without one.
        kind: the name without the layers' numbers and the word "weight", behind the stack: "self_attn.q_proj".
        shape: `(m, n)`, as stored.
        block_size: b.
        change: the root mean square change of each block, `float64[ceil(m/b), ceil(n/b)]` on the CPU; NaN where no
            block has ever been, infinite where values are not finite.
        present: where the blocks are now, `bool[ceil(m/b), ceil(n/b)]`.
        squares: the sum of the squared changes.
    """

    name: str
    stack: str
    layer: int | None
    kind: str
    shape: tuple[int, int]
    block_size: int
    change: Tensor
    present: Tensor
    squares: float

    @property
    def layer_name(self) -> str | None:
        """The layer's number, behind the stack; None without a number."""
        return None if self.layer is None else ".".join(filter(None, (self.stack, str(self.layer))))

    @property
    def trained(self) -> int:
        """The number of blocks that have ever been trained."""
        return int((~self.change.isnan()).sum())


def changes_of(model: nn.Module) -> list[WeightChange]:
    """Return the change of every weight of `model` that carries blocks, in the order of the model.

    Raises:
        EmbedError: the model carries no blocks, the base of a weight is not known, or `disable_adapter` shows the base.
    """
    states = block_states(model)
    if not states:
        raise EmbedError("The model carries no blocks; load an adapter or train first.")
    places = places_of(states)
    return [_change_of(name, places[name], state) for name, state in states.items()]


def by_kind(changes: Iterable[WeightChange]) -> dict[str, list[WeightChange]]:
    """Return the changes by kind of weight; a kind's weights keep their order."""
    found: dict[str, list[WeightChange]] = {}
    for change in changes:
        found.setdefault(change.kind, []).append(change)
    return found


def _change_of(name: str, place: Place, state: BlockState) -> WeightChange:
    state.check_enabled()
    state.sync()
    state.check_base_known()
    b, (m, n) = state.mask.block_size, state.mask.shape
    places, grid = state.originals.places, grid_shape((m, n), b)
    now = state.values_at(places).cpu().double()
    # Both hold zeros beyond the weight's edge, which are no elements of the mean.
    squares = (now - state.originals.values.double()).square_().sum((1, 2))
    inside = torch.minimum(torch.tensor(b), m - places[0] * b) * torch.minimum(torch.tensor(b), n - places[1] * b)
    change = torch.full(grid, float("nan"), dtype=torch.float64)
    change[places[0], places[1]] = (squares / inside).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)
    return WeightChange(
        name, place.stack, place.layer, place.kind, (m, n), b, change, state.mask.block_map(), float(squares.sum())
    )
