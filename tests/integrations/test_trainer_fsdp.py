"""A Trainer in two processes, under FSDP2: the training of one process, with its checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import two_ranks
from interrupted import STOP, Made, base, make
from like_torchrun import free_port
from trainer_fsdp_ranks import EXACT, SETTINGS, difference, options_of


def alone(directory: Path, name: str) -> Made:
    """Make the training on one process, with joint batches."""
    setting = SETTINGS[name]
    arguments = {"per_device_train_batch_size": 4, **setting.arguments}
    return make(
        directory, replace(setting, optimizer="trainer", compiled=False, arguments=arguments), **options_of(name)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train by one process, and then by two, which compare their trainings with each other."""
    directory = tmp_path_factory.mktemp("ranks")
    for name in EXACT:
        made = alone(directory / "alone" / name, name)
        made.trainer.train()
        torch.save(made.model.state_dict(), directory / "alone" / f"{name}.pt")
    two_ranks.run("trainer_fsdp_ranks.py", directory, free_port())
    return directory


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_like_one(name: str, trained: Path) -> None:
    found, wanted = torch.load(trained / name / "trained.pt"), torch.load(trained / "alone" / f"{name}.pt")
    assert difference(found, wanted) < 1e-5
    assert difference(found, base(SETTINGS[name]).model.state_dict()) > 1e-3


@pytest.mark.parametrize("name", ["the Trainer's optimizer", "moving"])
def test_one_process_goes_on_from_the_checkpoint_of_two(name: str, trained: Path, tmp_path: Path) -> None:
    made = alone(tmp_path, name)
    made.trainer.train(resume_from_checkpoint=str(trained / name / f"checkpoint-{STOP}"))
    assert difference(made.model.state_dict(), torch.load(trained / name / "trained.pt")) < 1e-5


def test_a_checkpoint_has_the_files_of_one_process(trained: Path) -> None:
    names = {path.name for path in (trained / "moving" / f"checkpoint-{STOP}").iterdir()}
    adapter = {name for name in names if name.startswith("sylva_adapter")}
    others = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin", "sylva_schedules.pt"}
    assert names == adapter | others | {"rng_state_0.pth", "rng_state_1.pth"} and len(adapter) == 2
