"""Make a GPU the current one for a launch: Triton launches on the current GPU, wherever the arguments lie."""

import contextlib
from contextlib import AbstractContextManager

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that makes `device` the current one for a launch; it does nothing if `device` is no GPU.

    Without it, the kernels of a model that spans several GPUs would run on the wrong GPU, where no stream's order makes
    them wait for the tensors that they read.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
