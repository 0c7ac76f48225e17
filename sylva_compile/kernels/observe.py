"""`sylva::observe`: replaces a weight gradient in a trace. It passes the operands to the listeners and returns 0.

The op does not compute the product. It takes the weight as an argument, so that a listener learns at run time *which*
weight the operands belong to: one compiled graph may serve several layers, and a weight recorded at compile time would
be that of the first layer for all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Listener = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], None]
"""A call is `listener(weight, lhs [T, m], rhs [T, n], activation_is_lhs, offsets)`.

The weight's gradient is `lhsᵀ · rhs`; with `offsets [E]`, that of each of E experts over its own tokens.
"""

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
def observe(lhs: Tensor, rhs: Tensor, weight: Tensor, activation_is_lhs: bool, offsets: Tensor | None = None) -> Tensor:
    """Pass the operands of a weight's gradient to the listeners.

    Args:
        lhs: `[T, m]`.
        rhs: `[T, n]`.
        weight: `[m, n]`, whose gradient is `lhsᵀ · rhs`; or stacked experts `[E, m, n]`.
        activation_is_lhs: whether `lhs`, and not `rhs`, is the layer's input.
        offsets: for experts, `int[E]`: where the tokens of each end, sorted by expert.

    Returns:
        Zero, `[]`, in the weight's dtype.
    """
    for listener in _listeners:
        listener(weight, lhs, rhs, activation_is_lhs, offsets)
    return weight.new_zeros(())


@observe.register_fake
def _(lhs: Tensor, rhs: Tensor, weight: Tensor, activation_is_lhs: bool, offsets: Tensor | None = None) -> Tensor:
    return weight.new_empty(())
