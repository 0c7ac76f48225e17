"""`sylva::probe`: marks where the dense gradient of a weight would become the gradient of the weight's probe.

A trace of a sharded model keeps its weights frozen and reads each through a probe, a scalar that requires grad. In a
compiled graph a pass replaces this op, and the product that made the dense gradient, by `sylva::observe`. An op that
still runs has a gradient that nobody observed.
"""

import torch
from torch import Tensor


@torch.library.custom_op("sylva::probe", mutates_args=())
def probe(gradient: Tensor, leaf: Tensor) -> Tensor:
    """Return the gradient of a probe whose weight's gradient was computed and not observed.

    Args:
        gradient: `[m, n]`, the gradient of the weight as stored.
        leaf: `[]`, the probe.

    Returns:
        `[]` in the probe's dtype: one if the gradient has any value but zero, else zero.
    """
    return gradient.any().to(leaf.dtype)


@probe.register_fake
def _(gradient: Tensor, leaf: Tensor) -> Tensor:
    return leaf.new_empty(())
