"""One of two processes that train by a Trainer, stop and resume: `trainer_two_ranks.py RANK DIRECTORY PORT`."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from interrupted import STEPS, Setting, assert_same, make

SETTING = Setting(
    schedule="moving",
    dtype=torch.bfloat16,
    trained=("lm_head.weight",),
    dropout=0.2,
    arguments={"ddp_backend": "gloo", "ddp_find_unused_parameters": False},
)


def main(directory: Path) -> None:
    once = make(directory, SETTING)
    once.trainer.train()
    assert isinstance(once.trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    again = make(directory, SETTING)
    torch.rand(7)
    again.trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{STEPS // 2}"))
    assert again.losses() == once.losses()
    assert_same(again.model, once.model)
    parameters = [parameter.detach().clone() for parameter in again.model.parameters()]
    for parameter in parameters:
        other = parameter.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, parameter)


if __name__ == "__main__":
    rank, folder, port = sys.argv[1:]
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(here)
    main(Path(folder))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without destructors, for the reason in `two_ranks.process_group`.
    os._exit(0)
