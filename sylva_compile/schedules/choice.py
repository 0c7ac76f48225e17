"""Where blocks go: at random, by score, each place once before any twice; inside some columns or all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LOWEST = -1e30
"""The logarithm of a score of zero: below every other, above the places that are not allowed."""


def sample(
    scores: Tensor | None, count: int, allowed: Tensor, temperature: float, generator: torch.Generator
) -> Tensor:
    """Choose `count` of the places that are `allowed`, without replacement.

    A place is drawn with a probability in proportion to `scores ** (1 / temperature)` (Gumbel-top-k; Kool, van Hoof and
    Welling, 2019). So 0 takes the highest scores, 1 draws by score, and infinity draws all alike.

    Args:
        scores: not negative, in the shape of `allowed`; None draws all alike.
        count: at most the number of allowed places.
        allowed: `bool`, any shape.
        temperature: 0 or more.
        generator: of the CPU.

    Returns:
        `bool` in the shape of `allowed`, true at `count` places.
    """
    # float64, in which two equal draws are next to impossible, however large the grid.
    noise = -torch.rand(allowed.shape, generator=generator, dtype=torch.float64, device="cpu").log_().neg_().log_()
    keys = noise
    if scores is not None and temperature != float("inf"):
        logarithms = scores.double().log().clamp(min=LOWEST)
        keys = logarithms if temperature == 0 else (logarithms / temperature).clamp(min=LOWEST) + noise
    best = keys.masked_fill(~allowed, -torch.inf).flatten().topk(count).indices
    return torch.zeros(allowed.numel(), dtype=torch.bool, device="cpu").index_fill_(0, best, True).view(allowed.shape)


def sample_columns(
    scores: Sequence[Tensor], counts: Sequence[int], kept: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Choose `kept` columns for blocks of several weights, whose columns are the same input channels.

    A column's score is what its best blocks score, so many as a column gets on average.

    Args:
        scores: for each weight, `[rows, columns]`.
        counts: the number of blocks of each weight.
        kept: the number of columns to choose.
        temperature: see `sample`.
        generator: of the CPU.

    Returns:
        `bool[columns]`.
    """
    total = torch.zeros(scores[0].shape[1], dtype=torch.float64, device="cpu")
    for score, count in zip(scores, counts, strict=True):
        best = score.topk(min(score.shape[0], -(-count // kept)), dim=0).values.sum(0).double()
        # Every weight counts the same, whatever the size of its gradients.
        total += best / best.sum().clamp(min=1e-30)
    return sample(total, kept, torch.ones_like(total, dtype=torch.bool), temperature, generator)


class Cycle:
    """Goes through all places of a grid in a random order, and through another order after that."""

    def __init__(self, places: int) -> None:
        """Begin before the first order of `places`."""
        self._order = torch.empty(0, dtype=torch.int64)
        self._places = places

    def take(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the next `count` places, each once: `bool[places]`."""
        chosen = torch.zeros(self._places, dtype=torch.bool, device="cpu")
        head, self._order = self._order[:count], self._order[count:]
        chosen[head] = True
        if missing := count - len(head):
            order = torch.randperm(self._places, generator=generator, device="cpu")
            # Those that end the old order are among the last of the new one.
            order = torch.cat([order[~chosen[order]], order[chosen[order]]])
            chosen[order[:missing]] = True
            self._order = order[missing:]
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """Return what is left of the order."""
        return {"order": self._order.to(torch.int32)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was made."""
        self._order = state["order"].to(torch.int64)
