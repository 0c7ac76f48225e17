"""A queue of tokens, by which one call updates many small factors of one shape.

An update of an online hierarchy is more than a hundred small operations, QR and SVD of thin matrices among them. A GPU
takes longer to launch them than to run them, and a model has hundreds of factors. So factors of one size that receive
equally many tokens are updated together. A backward pass produces their tokens one factor after another, hence the
queue keeps tokens until others have come: up to a memory bound, and no longer than the batch.

The queue holds a copy of the tokens. The tokens passed to a factor's `update` may be a view of an activation or of a
gradient. Later operations of the backward pass may free it or accumulate into it, and user code may overwrite it; a
view would also keep its whole base tensor in memory. The copy has the factor's dtype and slots, which an update needs
in any case.

The sums equal those of single updates up to rounding, no matter when the queue is flushed: grouping changes only the
order of operations inside batched products. The same updates in the same order give the same bits, because they form
the same groups.

On a CPU the queue keeps no tokens. Single updates start quickly there, and their tokens are still in the cache.
`python -m benchmarks.grouped_updates` times both ways and counts the operations that grouping saves.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

GROUP_BYTES = 512 * 2**20
"""Bytes that a queue may take on a GPU: waiting tokens, and the working memory of their joint update."""

GROUP_BYTES_ON_CPU = 0

_Factor = TypeVar("_Factor")


def group_bytes(device: torch.device) -> int:
    """Return the bytes that a queue may take on `device`."""
    return GROUP_BYTES_ON_CPU if device.type == "cpu" else GROUP_BYTES


@dataclass
class _Group(Generic[_Factor]):
    """Factors that one call will update, and the tokens of each."""

    factors: list[_Factor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


class UpdateQueue(Generic[_Factor]):
    """Tokens of one batch that wait for a joint update.

    Each trace has its own queue. If the trace fails, its waiting tokens are dropped with the queue.
    """

    def __init__(self, update: Callable[[Sequence[_Factor], Sequence[Tensor]], None]) -> None:
        """Start empty; `update(factors, tokens)` adds to each of several factors its own tokens."""
        self._update = update
        self._groups: dict[Hashable, _Group[_Factor]] = {}
        self._waiting: set[int] = set()
        self._held = 0

    def make_room(self, factor: _Factor, nbytes: int, device: torch.device) -> bool:
        """Return whether an update of `factor` that takes `nbytes` may wait; flush the queue first if needed.

        It flushes if memory would not suffice, or if `factor` itself waits already, because the updates of a factor
        keep their order. It flushes the whole queue, so that the groups depend only on the order and the shapes of the
        updates.
        """
        limit = group_bytes(device)
        fits = nbytes <= limit
        if id(factor) in self._waiting or (fits and self._held + nbytes > limit):
            self.flush()
        return fits

    def add(self, factor: _Factor, tokens: Tensor, *, group: Hashable, nbytes: int) -> None:
        """Add `tokens` to the queue, for `factor`; the caller has called `make_room`.

        Args:
            factor: the factor to update.
            tokens: its tokens; the caller does not change them any more.
            group: factors with an equal key are updated together.
            nbytes: memory that the tokens and their part of the joint update take.
        """
        waiting = self._groups.setdefault(group, _Group())
        waiting.factors.append(factor)
        waiting.tokens.append(tokens)
        self._waiting.add(id(factor))
        self._held += nbytes

    def flush(self) -> None:
        """Do all waiting updates. If one fails, the queue drops the rest: the batch is lost, and with it the trace."""
        groups, self._groups = self._groups, {}
        self._waiting.clear()
        self._held = 0
        for group in groups.values():
            self._update(group.factors, group.tokens)
