"""Tokens that wait for others of their shape, so that many small factors are updated in one call.

An update of an online hierarchy is more than a hundred small operations, QR and SVD of thin matrices among them. A GPU
starts them more slowly than it runs them, and a model has hundreds of factors. So factors of one size that are shown as
many tokens each are updated together. They come one by one in a backward pass, hence their tokens wait: up to a bound,
and never beyond the batch.

What waits is a copy. The tokens handed over may be a view of an activation or of a gradient, which later operations of
the backward pass may free, accumulate into or, in code of the user's, overwrite; and a view would keep all of the
tensor that it is cut from in memory. The copy has the factor's dtype and slots, which an update needs in any case.

The sums are those of single updates up to rounding, wherever the queue was emptied: nothing but the order of operations
inside of batched products depends on it. The same updates in the same order give the same bits, for what goes together
is then the same too.

On a CPU nothing waits. Single updates start quickly there and find their tokens in the cache still; `python
benchmarks/grouped_updates.py` shows both, and how many operations grouping saves.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

GROUP_BYTES = 512 * 2**20
"""What a queue may take on a GPU: tokens that wait, and the working memory of their joint update."""

GROUP_BYTES_ON_CPU = 0

_Factor = TypeVar("_Factor")


def group_bytes(device: torch.device) -> int:
    """What a queue may take on `device`."""
    return GROUP_BYTES_ON_CPU if device.type == "cpu" else GROUP_BYTES


@dataclass
class _Group(Generic[_Factor]):
    """Factors to be updated together, and the tokens of each."""

    factors: list[_Factor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


class UpdateQueue(Generic[_Factor]):
    """Tokens of one batch that wait. A queue belongs to one trace; what waits when that fails is gone with it."""

    def __init__(self, update: Callable[[Sequence[_Factor], Sequence[Tensor]], None]) -> None:
        """Empty; `update` adds to each of several factors its tokens."""
        self._update = update
        self._groups: dict[Hashable, _Group[_Factor]] = {}
        self._waiting: set[int] = set()
        self._held = 0

    def make_room(self, factor: _Factor, nbytes: int, device: torch.device) -> bool:
        """Whether an update of `factor` that takes `nbytes` may wait; what waits already is done first if need be.

        That is when memory is used up or `factor` itself waits, for its updates keep their order. All of the queue is
        done then, so that it depends on the order and the shapes of updates alone what goes together.
        """
        limit = group_bytes(device)
        fits = nbytes <= limit
        if id(factor) in self._waiting or (fits and self._held + nbytes > limit):
            self.flush()
        return fits

    def add(self, factor: _Factor, tokens: Tensor, *, group: Hashable, nbytes: int) -> None:
        """Let `tokens`, which nobody else changes, wait for `factor`; `make_room` comes before.

        Args:
            factor: to be updated.
            tokens: its tokens.
            group: factors that agree in it are updated together.
            nbytes: what the tokens and their part of the joint update take in memory.
        """
        waiting = self._groups.setdefault(group, _Group())
        waiting.factors.append(factor)
        waiting.tokens.append(tokens)
        self._waiting.add(id(factor))
        self._held += nbytes

    def flush(self) -> None:
        """Do all updates that wait. If one fails none waits any more: the batch is lost, and the trace with it."""
        groups, self._groups = self._groups, {}
        self._waiting.clear()
        self._held = 0
        for group in groups.values():
            self._update(group.factors, group.tokens)
