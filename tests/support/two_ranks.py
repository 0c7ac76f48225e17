"""Scripts that two processes run together: started and awaited by `run`, joined in `process_group`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def process_group(rank: int, store: str) -> Iterator[dist.ProcessGroup]:
    """The group of two ranks that meet at the file `store`; the process ends with the block.

    It ends without the destructors: Gloo's waits for its threads under the interpreter's lock, which a thread may want
    for what its last work holds (https://github.com/pytorch/pytorch/issues/56297), and one run in ten never came back.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    # Nobody leaves while the other still needs an answer.
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(script: str, *arguments: str | Path, timeout: float = 300) -> list[str]:
    """What both ranks print: `python SCRIPT RANK *arguments` for ranks 0 and 1, neither of which outlives the call."""
    path = Path(__file__).parent / script
    ranks = [
        subprocess.Popen([sys.executable, path, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        printed = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return printed
