"""One of two processes that pre-train by a Trainer and resume: `pretrain_two_ranks.py RANK DIRECTORY PORT`."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from interrupted import seed
from tiny_models import tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments

import sylva_compile
from sylva_compile.integrations import LowRankCallback
from sylva_compile.schedules import MaskChange, ScheduleCallback

STEPS, FIRST = 6, 3
"""All steps, and the number of those before adapters are added."""


def made(directory: Path, dtype: torch.dtype, resume_from: Path | None = None, **arguments: Any) -> Any:
    """Make a Trainer of a tiny model, always the same."""
    seed(0)
    case = tiny("llama", layers=1)
    case.model.to(dtype)
    masks = sylva_compile.prune_masks(case.model)
    masks.embed()
    data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(12)]
    options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    args = TrainingArguments(
        str(directory), use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.01, **(options | arguments)
    )
    callbacks = [
        LowRankCallback(3, share=(STEPS - FIRST) / STEPS, resume_from=resume_from),
        ScheduleCallback(MaskChange(masks, every=2), resume_from=resume_from),
    ]
    return Trainer(case.model, args, train_dataset=data, callbacks=callbacks)


def values(trainer: Any) -> dict[str, Tensor]:
    """Return a copy of the parameters of the Trainer's model."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def main(directory: Path) -> None:
    several = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    once = made(directory, torch.float32, **several)
    once.train()
    assert isinstance(once.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    wanted = values(once)
    assert any(value.any() for name, value in wanted.items() if "right" in name)
    for name, value in wanted.items():
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value), name
    checkpoint = directory / f"checkpoint-{FIRST + 1}"
    again = made(directory / "again", torch.float32, checkpoint, **several)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in values(again).items():
        assert torch.equal(value, wanted[name]), name


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
