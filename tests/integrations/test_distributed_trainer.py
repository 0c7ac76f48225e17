"""A Trainer in two processes, under DistributedDataParallel."""

from dataclasses import replace
from pathlib import Path

import torch
import two_ranks
from interrupted import make
from like_torchrun import free_port
from trainer_two_ranks import JOINT


def test_two_ranks_train_like_one_and_resume_the_undisturbed_training(tmp_path: Path) -> None:
    two_ranks.run("trainer_two_ranks.py", tmp_path, free_port())
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "sylva_adapter.json", "sylva_schedules.pt"} <= names
    assert not [name for name in names if name.startswith(("model", "tmp-"))]
    first, second = (torch.load(tmp_path / f"joint{rank}.pt") for rank in (0, 1))
    alone = make(tmp_path / "alone", replace(JOINT, arguments=JOINT.arguments | {"per_device_train_batch_size": 4}))
    untrained = {name: value.clone() for name, value in alone.model.state_dict().items()}
    alone.trainer.train()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(first[name], second[name]), f"ranks differ in {name}"
        assert float((first[name] - value).abs().max()) < 1e-5, name
    assert float((first["lm_head.weight"] - untrained["lm_head.weight"]).abs().max()) > 1e-3
