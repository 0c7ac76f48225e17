"""One of two processes that train by a Trainer, stop and resume: `trainer_two_ranks.py RANK DIRECTORY PORT`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from interrupted import STEPS, Setting, assert_same, make
from like_torchrun import one_of_several

SETTING = Setting(
    schedule="moving",
    dtype=torch.bfloat16,
    trained=("lm_head.weight",),
    dropout=0.2,
    arguments={"ddp_backend": "gloo", "ddp_find_unused_parameters": False},
)
JOINT = Setting(schedule="moving", trained=("lm_head.weight",), arguments={"gradient_accumulation_steps": 2})
"""What one process trains to the same values, on joint batches."""


def main(directory: Path) -> None:
    under_ddp = Setting(**{**vars(JOINT), "arguments": JOINT.arguments | SETTING.arguments})
    joint = make(directory / "joint", under_ddp)
    joint.trainer.train()
    torch.save(joint.model.state_dict(), directory / f"joint{dist.get_rank()}.pt")
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
    number, folder, port = sys.argv[1:]
    with one_of_several(number, port):
        main(Path(folder))
