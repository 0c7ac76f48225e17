"""Peak memory of tensors during a call."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_above(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Run `work`; return its result, and the peak bytes of tensors on `device` above those at its start.

    torch has no memory statistics for the CPU, so there its profiler records every allocation, and `work` runs a little
    slower. The profiler misses memory that others than torch allocate (a compiler, a library's own workspace), and
    tensors that existed before: they count until the end even if `work` frees them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()
    level = peak = 0
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    for event in sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return result, peak
