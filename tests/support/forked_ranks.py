"""Run functions in several processes that are forked from this one, so that no process imports torch again.

Call it from a process of its own that has started no threads: a fork keeps none.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_LATEST = 60
"""The seconds after which processes that have not ended are killed."""


def start(work: Callable[..., Any], ranks: int, store: Path, *arguments: Any) -> list[int]:
    """Start `work(*arguments)` in `ranks` processes that are connected by Gloo; return their ids.

    A process ends with 0, or with 1 after it has printed the error that `work` has raised.
    """
    store.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    started = []
    for rank in range(ranks):
        if not (process := os.fork()):
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
                work(*arguments)
                # No rank exits while another still waits for its messages.
                dist.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            # Without destructors, for the reason in `two_ranks.process_group`.
            os._exit(code)
        started.append(process)
    return started


def wait(processes: list[int]) -> list[int]:
    """Wait for processes; return the exit status of each, or minus the signal that has killed it."""
    codes: dict[int, int] = {}
    end = time.monotonic() + _LATEST
    while len(codes) < len(processes):
        for process in set(processes) - codes.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(process, 9)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def run(work: Callable[..., Any], ranks: int, store: Path, *arguments: Any) -> None:
    """Run `work(*arguments)` in `ranks` processes to its end; raise AssertionError where one fails."""
    codes = wait(start(work, ranks, store, *arguments))
    assert codes == [0] * ranks, f"{work.__name__}{arguments} on {ranks} ranks: {codes}"
