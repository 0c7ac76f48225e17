"""One of several processes as torchrun starts them, in which accelerate may shard on the CPU."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def free_port() -> str:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@contextmanager
def one_of_several(rank: str, port: str, ranks: str = "2") -> Iterator[None]:
    """Set what torchrun sets; the process exits at the end of the block, for the reason in `two_ranks`."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(here)
    yield
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shard_on_the_cpu() -> None:
    """Let accelerate shard on the CPU from now on, where it ignores its FSDP plugin otherwise."""
    make = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
