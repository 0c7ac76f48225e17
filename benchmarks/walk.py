"""Walks over a list of learning rates until the best one is bracketed."""

from collections.abc import Collection, Sequence


def next_rate(rates: Sequence[float], start: float, tried: Collection[float], best: Collection[float]) -> float | None:
    """Return the learning rate of `rates`, in rising order, that a walk tries next, or None where it ends.

    It begins at `start` and ends when the best of the tried rates has tried neighbours, or is an end of the list. One
    rate at a time: what it finds may make the other neighbour needless.

    Args:
        rates: the list, in rising order.
        start: the first rate.
        tried: the rates that have been tried, on this walk or another.
        best: the best of them; several where they are equal.
    """
    if start not in tried:
        return start
    near = sorted({at + by for at in map(rates.index, best) for by in (-1, 1)} & set(range(len(rates))))
    return next((rates[at] for at in near if rates[at] not in tried), None)
