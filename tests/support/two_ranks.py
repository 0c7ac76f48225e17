"""Run a script in several processes: `run` starts them and waits for them, `process_group` connects them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def process_group(rank: int, store: str, ranks: int = 2) -> Iterator[dist.ProcessGroup]:
    """Yield the group of ranks that meet at the file `store`; the process exits at the end of the block.

    It exits without destructors: Gloo's holds the interpreter's lock while it waits for its threads, and a thread may
    need that lock to release its last work (https://github.com/pytorch/pytorch/issues/56297). One run in ten hung.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    # Neither rank exits while the other still waits for its messages.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(script: str, *arguments: str | Path, timeout: float = 300, ranks: int = 2) -> list[str]:
    """Run `python SCRIPT RANK *arguments` for every rank; return the output of each. None outlives the call."""
    path = Path(__file__).parent / script
    # One thread a rank: more would wait for each other on a small machine. Scripts import the benchmarks as well.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, path, str(rank), *arguments], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * ranks
    return printed
