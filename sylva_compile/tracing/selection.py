"""From block scores to masks: exact counts, one budget a weight or one for all, a limit on input columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sylva_compile.errors import ArgumentError

Allocation = Literal["layer", "global"]

ChooseBlocks = Callable[[str, int, Tensor], Tensor]
"""Takes a weight's name, how many blocks, and which are allowed; returns a `bool` map of so many of these."""


@dataclass(frozen=True)
class Budget:
    """How many blocks to take, and from where.

    Attributes:
        sparsity: share of blocks that stay frozen, in [0, 1).
        allocation: `"layer"`: each weight keeps its own share, and one block at least; `"global"`: the best blocks of
            all weights together.
        column_budget: at most this fraction of a weight's input block columns holds blocks (one column at least).
    """

    sparsity: float
    allocation: Allocation = "layer"
    column_budget: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ArgumentError(f"sparsity={self.sparsity!r}; use a number in [0, 1), such as 0.98 to train 2%.")
        if self.allocation not in ("layer", "global"):
            raise ArgumentError(f"allocation={self.allocation!r}; use 'layer' or 'global'.")
        if self.column_budget is not None and not 0.0 < self.column_budget <= 1.0:
            raise ArgumentError(f"column_budget={self.column_budget!r}; use None or a number in (0, 1].")

    def blocks(self, total: int) -> int:
        """How many of `total` blocks to take: the nearest whole number, halves up, and one at least."""
        # The small term undoes what binary fractions lose: 30% of 35 is 10.5, not a little less.
        return max(1, int((1 - self.sparsity) * total + 0.5 + 1e-9))


def select_blocks(
    scores: Mapping[str, Tensor], budget: Budget, input_axes: Mapping[str, int], choose: ChooseBlocks | None = None
) -> dict[str, Tensor]:
    """ChooseBlocks blocks by score.

    Args:
        scores: weight name to scores over its block grid, as the weight is stored; higher is better.
        budget: how many.
        input_axes: weight name to the axis of its grid that the inputs meet.
        choose: chooses within a weight once the scores have told how many blocks it gets, and in which columns; None:
            the highest scores are taken.

    Returns:
        Weight name to `bool` block map. Exactly the wanted number is taken; ties go to the earlier position.

    Raises:
        ArgumentError: scores are not finite, or the column budget has no room for the wanted number.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ArgumentError(
                f"{name}: block scores are not finite; raise damping, or look for overflow in the model."
            )

    def highest(name: str, count: int, allowed: Tensor) -> Tensor:
        return _best(scores[name].masked_fill(~allowed, -torch.inf).flatten(), count).view(allowed.shape)

    choose = choose or highest
    if budget.allocation == "layer":
        maps = {}
        for name, score in scores.items():
            wanted = budget.blocks(score.numel())
            allowed = _allowed(score, wanted, budget, input_axes[name])
            _check_room(name, int(allowed.sum()), wanted, budget)
            maps[name] = choose(name, wanted, allowed)
        return maps
    share = {name: budget.blocks(score.numel()) for name, score in scores.items()}
    wanted = budget.blocks(sum(score.numel() for score in scores.values()))
    allowed_of = {name: _allowed(score, share[name], budget, input_axes[name]) for name, score in scores.items()}
    _check_room("all weights", int(sum(allowed.sum() for allowed in allowed_of.values())), wanted, budget)
    flat = [score.masked_fill(~allowed_of[name], -torch.inf).flatten() for name, score in scores.items()]
    chosen = _best(torch.cat(flat), wanted).split([part.numel() for part in flat])
    counts = [int(part.sum()) for part in chosen]
    return {name: choose(name, count, allowed_of[name]) for name, count in zip(scores, counts, strict=True)}


def _best(scores: Tensor, count: int) -> Tensor:
    """`bool`, true for the `count` highest of `scores`; of equals, the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return torch.zeros(scores.shape, dtype=torch.bool, device="cpu").index_fill_(0, order, True)


def _allowed(scores: Tensor, wanted: int, budget: Budget, axis: int) -> Tensor:
    """Blocks in the columns that the budget keeps: those whose best blocks, an equal part of `wanted`, add up most."""
    allowed = torch.ones(scores.shape, dtype=torch.bool, device="cpu")
    if budget.column_budget is None:
        return allowed
    columns = scores.shape[axis]
    # The small term, as in Budget.blocks: 29% of 100 is 29 columns.
    kept = max(1, int(budget.column_budget * columns + 1e-9))
    each = min(scores.shape[1 - axis], -(-wanted // kept))
    value = scores.topk(each, dim=1 - axis).values.sum(1 - axis)
    keep = _best(value, kept)
    return allowed & (keep[None, :] if axis == 1 else keep[:, None])


def _check_room(name: str, room: int, wanted: int, budget: Budget) -> None:
    if room < wanted:
        raise ArgumentError(
            f"{name}: column_budget={budget.column_budget} leaves room for {room} blocks, "
            f"sparsity={budget.sparsity} wants {wanted}; raise either."
        )
