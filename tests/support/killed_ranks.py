"""Kill one of two processes by SIGKILL at drawn moments, and start fresh jobs: `python killed_ranks.py 0 DIRECTORY`.

The other process must end with an error at once. No job may read a file that is written in part, and a fresh job must
end with the weights of the undisturbed run, bit for bit.
"""

import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked_ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_training import Training, assert_same, warm_up
from trace_two_ranks import model_and_data, regression

import sylva_compile
from sylva_compile.adapters import format as adapter_format
from sylva_compile.adapters.format import read_adapter

STEPS, EVERY = 8, 3
PROMPT = 10.0
"""The seconds that the other process may take. Gloo takes 0.1; a busy machine may start it late."""


class Death:
    """The drawn end of one process: so many seconds after an event of some name has come for the `count`-th time.

    Events have the names "step", "save", "adapter" and "batch", and those of functions that `before` has seen.
    """

    def __init__(self, event: str, count: int, seconds: float, rank: int) -> None:
        self.event, self.count, self.seconds, self.rank = event, count, seconds, rank
        self.seen = 0

    def __call__(self, event: str) -> None:
        """Note an event; the process ends if this is the one."""
        if event != self.event or dist.get_rank() != self.rank:
            return
        self.seen += 1
        if self.seen == self.count and self.seconds:
            threading.Timer(self.seconds, self.end).start()
        elif self.seen == self.count:
            self.end()

    def end_of_job(self) -> None:
        """Wait for the others; whoever is to die waits for that."""
        if self.seen and dist.get_rank() == self.rank:
            time.sleep(PROMPT)
        dist.barrier()

    def end(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def before(self, owner: Any, name: str) -> Iterator[None]:
        """Note an event of that name whenever the function `name` of `owner` is about to be called."""
        function = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            self(name)
            return function(*arguments, **options)

        setattr(owner, name, noted)
        yield
        setattr(owner, name, function)


@contextmanager
def told(directory: Path) -> Iterator[None]:
    """Keep the error that ends a process, and when."""
    try:
        yield
    except BaseException:
        (directory / f"error{dist.get_rank()}").write_text(traceback.format_exc())
        os._exit(1)


def train(directory: Path, how: str, death: Death) -> None:
    """Train from the last whole checkpoint on, with a checkpoint and an adapter after every few steps."""
    training = Training(how, every=2)
    whole = [int(path.parent.name) for path in directory.glob("*/.metadata")]
    with told(directory), death.before(dcp.FileSystemWriter, "finish"), death.before(adapter_format, "write_file"):
        if whole:
            dcp.load({"blocks": training.blocks_state()}, checkpoint_id=directory / str(max(whole)))
            training.steps = max(whole)
        while training.steps < STEPS:
            death("step")
            training.train(1)
            if training.steps % EVERY == 0:
                # An interrupted save may have left parts of this one.
                there = directory / str(training.steps)
                death("save")
                dcp.save({"blocks": training.blocks_state()}, checkpoint_id=there)
                death("adapter")
            # Under fully_shard, all processes bring their parts; otherwise each would write all of it.
            at_end = training.steps == STEPS
            if (at_end or training.steps % EVERY == 0) and (how == "before" or dist.get_rank() == 0):
                sylva_compile.save_adapter(training.model, directory / "adapter", modules_to_save=["head"])
        death.end_of_job()
        found = training.snapshot()
        if dist.get_rank() == 0:
            torch.save(found, directory / "end.pt")


def trace(directory: Path, how: str, death: Death) -> None:
    model, data = model_and_data()

    def batches() -> Iterator[Any]:
        for batch in data[dist.get_rank() :: 2] * 3:
            death("batch")
            yield batch

    with told(directory):
        masks = sylva_compile.trace_and_mask(
            model,
            batches(),
            loss_fn=regression,
            process_group=dist.group.WORLD,
            checkpoint=directory / "trace",
            checkpoint_every=1,
            num_samples=96,
            block_size=8,
            sparsity=0.8,
            progress=False,
        )
        death.end_of_job()
        masks.save(directory / f"masks{dist.get_rank()}")


NEVER = Death("", 0, 0.0, 0)


def undisturbed(directory: Path, job: Callable[..., None], how: str) -> Path:
    """Run a job to its end, and return its directory."""
    there = directory / f"{job.__name__}-{how}"
    forked_ranks.run(job, 2, there / "store", there, how, NEVER)
    return there


def kill(directory: Path, job: Callable[..., None], how: str, death: Death) -> None:
    """Run a job that loses a process, and check how the other one ends."""
    job_processes = forked_ranks.start(job, 2, directory / "store", directory, how, death)
    lost, other = job_processes[death.rank], job_processes[1 - death.rank]
    # The first waits for the process that is killed.
    (code,) = forked_ranks.wait([lost])
    assert code == -signal.SIGKILL, f"{death.event} {death.count} never came: {code}"
    began = time.monotonic()
    (code,) = forked_ranks.wait([other])
    took = time.monotonic() - began
    assert code == 1 and took < PROMPT, (code, took)
    error = (directory / f"error{1 - death.rank}").read_text().splitlines()
    print(f"{job.__name__} {how}: {death.event} {death.count} + {death.seconds:.3f} s, {took:.2f} s: {error[-1]}")


def check_training(directory: Path, how: str, death: Death, expected: Path) -> None:
    kill(directory, train, how, death)
    if death.event == "finish":
        (half,) = (path for path in directory.glob("[0-9]*") if not (path / ".metadata").exists())
        assert list(half.glob("*.distcp"))
    adapter = directory / "adapter"
    if (adapter / "sylva_adapter.json").exists():
        # The old one or the new one, in one piece.
        read_adapter(adapter)
    forked_ranks.run(train, 2, directory / "store again", directory, how, NEVER)
    assert_same(torch.load(directory / "end.pt"), torch.load(expected / "end.pt"))
    found, wanted = read_adapter(adapter)[0], read_adapter(expected / "adapter")[0]
    assert found == wanted and len(list(adapter.glob("*.safetensors"))) == 1


def check_trace(directory: Path, how: str, death: Death, expected: Path) -> None:
    kill(directory, trace, how, death)
    assert "LostRankError" in (directory / f"error{1 - death.rank}").read_text()
    assert not list(directory.glob("masks*"))
    forked_ranks.run(trace, 2, directory / "store again", directory, how, NEVER)
    for rank in range(2):
        found, wanted = (sylva_compile.Masks.load(each / f"masks{rank}") for each in (directory, expected))
        assert dict(found) == dict(wanted)


def main(directory: Path) -> None:
    warm_up()
    draw = random.Random(0)
    ends = {how: undisturbed(directory, train, how) for how in ("ddp", "before")}
    deaths = [
        *((how, Death("step", draw.randint(2, STEPS - 1), draw.uniform(0, 0.02), draw.randrange(2))) for how in ends),
        *((how, Death("step", draw.randint(2, STEPS - 1), draw.uniform(0, 0.02), draw.randrange(2))) for how in ends),
        ("ddp", Death("save", draw.randint(1, 2), draw.uniform(0, 0.03), draw.randrange(2))),
        # All is written but the file that makes it whole.
        ("before", Death("finish", 2, 0.0, 0)),
        ("before", Death("adapter", draw.randint(1, 2), draw.uniform(0, 0.02), 1)),
        # The tensors of the new adapter are written, and the file that names them is not.
        ("before", Death("write_file", 4, 0.0, 0)),
    ]
    for number, (how, death) in enumerate(deaths):
        check_training(directory / str(number), how, death, ends[how])
    traced = undisturbed(directory, trace, "")
    for number in range(2):
        death = Death("batch", draw.randint(1, 5), draw.uniform(0, 0.02), draw.randrange(2))
        check_trace(directory / f"trace {number}", "", death, traced)
    print("10 kills")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
