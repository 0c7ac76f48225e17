"""The directory of a Trainer's checkpoint: which one is whole, and the states of schedules in it."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sylva_compile.adapters.format import CONFIG_NAME
from sylva_compile.errors import AdapterError, ArgumentError
from sylva_compile.integrations.schedule_states import load_state_beside_adapter, state_beside_adapter
from sylva_compile.schedules.protocol import Schedule

log = logging.getLogger(__name__)

SCHEDULES = "sylva_schedules.pt"
"""The file of the schedules' states in a checkpoint that holds an adapter."""
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
_STATE = "trainer_state.json"
"""The Trainer writes it last, so that a checkpoint which has it has everything."""


def last_whole_checkpoint(directory: Path) -> Path:
    """Return the newest checkpoint in `directory` that was written to its end; warn of later ones.

    Raises:
        AdapterError: there is none.
    """
    found = {
        int(match[1]): path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        if is_whole(path):
            return path
        log.warning("%s was not written to its end, so an earlier checkpoint is resumed.", path)
    raise AdapterError(f"{directory} holds no whole checkpoint; train without resume_from_checkpoint.")


def check_checkpoint(directory: Path, *, only_model: bool = False) -> None:
    """Raise AdapterError unless a training can be resumed from `directory`.

    Args:
        directory: of one checkpoint.
        only_model: the optimizer's state is not needed.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(
            f"{directory} holds no adapter ({CONFIG_NAME}); give a checkpoint that a BlocksTrainerMixin saved."
        )
    if only_model:
        return
    if not is_whole(directory):
        raise AdapterError(f"{directory} was not written to its end (no whole {_STATE}); resume an earlier checkpoint.")
    if not (directory / OPTIMIZER).is_file():
        raise AdapterError(
            f"{directory} holds no {OPTIMIZER} (save_only_model=True?), so its training cannot be resumed; call "
            "load_adapter(model, directory) and begin a new one."
        )


def is_whole(directory: Path) -> bool:
    """Whether the checkpoint in `directory` was written to its end."""
    try:
        return "global_step" in json.loads((directory / _STATE).read_text())
    except (OSError, ValueError):
        return False


def begin_checkpoint(directory: Path) -> None:
    """Let `directory` be no whole checkpoint until it is written to its end, whatever an earlier run has left there."""
    for name in (_STATE, SCHEDULES):
        (directory / name).unlink(missing_ok=True)


def states_beside_adapter(schedules: Sequence[Schedule]) -> list[dict[str, Any]]:
    """Return the states of `schedules` without what an adapter of the same step holds; all processes call it."""
    return [state_beside_adapter(schedule) for schedule in schedules]


def save_schedules(states: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Write `states_beside_adapter` into `directory`, beside the adapter; nothing if there are none.

    The caller sees to it that the file is not there in part.
    """
    if states:
        torch.save(list(states), directory / SCHEDULES)


def load_schedules(schedules: Sequence[Schedule], directory: Path) -> None:
    """Load the states that `save_schedules` wrote; the errors are those of `read_schedules`."""
    for schedule, state in zip(schedules, read_schedules(schedules, directory), strict=True):
        load_state_beside_adapter(schedule, state)


def read_schedules(schedules: Sequence[Schedule], directory: Path) -> list[dict[str, Any]]:
    """Read the states that `save_schedules` wrote, one of each of `schedules`.

    Raises:
        ArgumentError: `directory` has the states of more or fewer schedules.
    """
    path = directory / SCHEDULES
    states: list[dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else []
    if len(states) != len(schedules):
        raise ArgumentError(
            f"{directory} holds the states of {len(states)} schedules, and this Trainer has {len(schedules)}; give "
            "callbacks=[ScheduleCallback(...)] as in that training."
        )
    return states
