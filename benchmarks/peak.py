"""Peak memory of tensors while something runs."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_above(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `work` returns, and the most bytes of tensors on `device` at one time above those at its beginning.

    torch keeps no account of the CPU's memory, but its profiler sees every allocation; `work` runs a little slower
    under it. What is allocated past torch (by a compiler, for a library's own workspace) is not seen there, and what
    was there before counts to the end even if `work` frees it.
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
