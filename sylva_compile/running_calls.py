"""Calls of torch that are running, found in the frames of this thread, and the arguments that they were given.

Torch hands these arguments to nobody, or keeps them only when the call has ended.
"""

import sys
from types import FrameType
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def argument_of_ddp(ddp: Any, name: str) -> Any:
    """Return what a DistributedDataParallel was given as `name`, or None.

    While it is being made it has no such attribute for a time; the argument is then read from its `__init__`.
    """
    if name in vars(ddp):
        return vars(ddp)[name]
    frame = _running(DistributedDataParallel.__init__)
    return None if frame is None else frame.f_locals.get(name)


def is_inside_zero_optimizer() -> bool:
    """Whether a ZeroRedundancyOptimizer is making the optimizer that steps this process's part of the parameters."""
    # There is one only once its module is imported.
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and _running(module.ZeroRedundancyOptimizer._init_local_optimizer) is not None


def checkpoint_call() -> tuple[str, dict[str, Any]]:
    """Return the name of the function of `torch.distributed.checkpoint` that is running, and its local variables.

    The name is "save", "async_save" or "load"; "" and no variables where none of them is running.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("torch.distributed.checkpoint.") and frame.f_code.co_name in (
            "save",
            "async_save",
            "load",
        ):
            return frame.f_code.co_name, dict(frame.f_locals)
        frame = frame.f_back
    return "", {}


def _running(function: Any) -> FrameType | None:
    """Return the frame of the innermost call of `function` that is running."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame
