"""The optimizer for `masks.parameters()`."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019) over float32 blocks and any other parameters.

    A `torch.optim.AdamW` with this project's defaults: states and steps are torch's own, and checkpoints of either load
    into the other. What is written through into the dense weights after a step is the same for every torch optimizer.
    Weight decay defaults to 0: blocks are the weights themselves, and decaying them pulls a pre-trained model to zero.
    """

    def __init__(self, params: ParamsT, lr: float = 2e-4, *, weight_decay: float = 0.0, **options: Any) -> None:
        """`params` and `options` as for `torch.optim.AdamW`."""
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
