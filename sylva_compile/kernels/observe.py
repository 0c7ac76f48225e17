"""`sylva::observe`: stage 1's stand-in for a weight gradient. It shows the operands to whoever listens, and returns 0.

The product itself is never computed. The weight is an argument so that the listener learns at run time *which* weight
these operands belong to: a compiled graph may serve several layers, and what was true when it was compiled would then
be true of the first of them only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Listener = Callable[[Tensor, Tensor, Tensor, bool], None]
"""Called as `listener(weight, lhs [T, m], rhs [T, n], activation_is_lhs)`; the weight's gradient is `lhsᵀ · rhs`."""

_listeners: list[Listener] = []


@contextmanager
def observing(listener: Listener) -> Iterator[None]:
    """Send the operands of every observed weight gradient to `listener` while the context is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@torch.library.custom_op("sylva::observe", mutates_args=())
def observe(lhs: Tensor, rhs: Tensor, weight: Tensor, activation_is_lhs: bool) -> Tensor:
    """Show `lhs [T, m]` and `rhs [T, n]`, whose product `lhsᵀ · rhs` is the gradient of `weight [m, n]`; return 0."""
    for listener in _listeners:
        listener(weight, lhs, rhs, activation_is_lhs)
    return weight.new_zeros(())


@observe.register_fake
def _(lhs: Tensor, rhs: Tensor, weight: Tensor, activation_is_lhs: bool) -> Tensor:
    return weight.new_empty(())
