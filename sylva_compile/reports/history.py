"""The history of a training, from the log that the Trainer of transformers keeps in trainer_state.json."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sylva_compile.errors import ReportError

FILE = "trainer_state.json"
SCHEDULE = "schedule"
"""The key under which `ScheduleCallback` adds `history_entry` of its schedules to the log."""

Curve = Sequence[tuple[int, float]]
"""Values by step of the optimizer."""


@dataclass(frozen=True)
class History:
    """The curves of a training; empty where the log holds none.

    Attributes:
        loss: the training loss.
        held_out: the loss on held-out data.
        places: the share of the masked weights' blocks that have been trained so far.
        moves: the number of moves so far.
        importance: the score of each layer, by its name, as `LayerReport` gives it.
    """

    loss: Curve = ()
    held_out: Curve = ()
    places: Curve = ()
    moves: Curve = ()
    importance: dict[str, Curve] | None = None


def read_history(directory: Path) -> History:
    """Read the history from `trainer_state.json` in `directory`, in its newest checkpoint, or beside it.

    Raises:
        ReportError: there is no such file, or it is damaged.
    """
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: _number(path.name))
    folders = [directory, *reversed(checkpoints), directory.parent]
    path = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if path is None:
        raise ReportError(f"There is no {FILE} in {directory} or its checkpoints; give the Trainer's output directory.")
    try:
        return history_of(json.loads(path.read_text())["log_history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged or no Trainer wrote it ({error!r}); give another directory.") from error


def history_of(log: Sequence[dict[str, Any]]) -> History:
    """Return the curves of the Trainer's `log_history`."""

    def curve(name: str) -> Curve:
        return [(int(entry["step"]), float(entry[name])) for entry in log if name in entry]

    schedules = [(int(entry["step"]), entry[SCHEDULE]) for entry in log if SCHEDULE in entry]
    importance: dict[str, list[tuple[int, float]]] = {}
    for step, entry in schedules:
        for layer, score in entry.get("importance", {}).items():
            importance.setdefault(layer, []).append((step, float(score)))
    return History(
        loss=curve("loss"),
        held_out=curve("eval_loss"),
        places=[(step, float(entry["places"])) for step, entry in schedules if "places" in entry],
        moves=[(step, float(entry["moves"])) for step, entry in schedules if "moves" in entry],
        importance=dict(importance) or None,
    )


def _number(name: str) -> int:
    text = name.rpartition("-")[2]
    return int(text) if text.isdecimal() else -1
