"""`stay_wide`: trained values keep their precision when the model is converted to a narrow dtype."""

import torch
from torch import Tensor, nn


def stay_wide(parameter: nn.Parameter, before: Tensor, dtype: torch.dtype) -> None:
    """Let `parameter` be of `dtype` again, after a module's `_apply` has converted it, with its values from before.

    Args:
        parameter: the trained values, and their gradient, on the device where they shall be.
        before: the values before the conversion, on any device.
        dtype: that of trained values.
    """
    if parameter.dtype != dtype:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = before.to(device=parameter.device, dtype=dtype)
        parameter.grad = None if gradient is None else gradient.to(dtype)
