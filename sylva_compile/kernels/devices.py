"""Triton launches on the current device, whatever device its arguments lie on."""

import contextlib
from contextlib import AbstractContextManager

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one for a launch on it; nothing where it is no GPU.

    Without it, the kernels of a model that spans several GPUs would run on the wrong one, where no stream's order makes
    them wait for what they read.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
