"""The folder of a run: its settings, masks, checkpoints and, at the end, the adapter."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sylva_compile.adapters.format import CONFIG_NAME
from sylva_compile.blocks.masks import Masks
from sylva_compile.cli.models import check_new
from sylva_compile.errors import InputError
from sylva_compile.files import to_json, write_file
from sylva_compile.integrations.checkpoints import is_whole
from sylva_compile.version import __version__

_RUN = "sylva_run.json"
_MASKS = "masks.safetensors"
_MAY_CHANGE = (
    *("resume", "save_every", "log_every", "progress", "checkpoint", "checkpoint_every", "gradient_device"),
    *("out", "model", "data"),
)
"""Options that a run may be resumed with other values of; folders may have moved, and what is in them is checked."""


class RunFolder:
    """The folder of one run, which nothing is written to before training begins.

    Attributes:
        path: the folder.
        goes_on: whether a run in it is resumed.
    """

    def __init__(self, path: Path, options: Sequence[Any], *, resume: bool) -> None:
        """Check that a run with `options`, dataclasses, may begin in `path`, or go on there.

        Raises:
            InputError: `path` holds something else, or a run with other options; or there is none to go on with.
        """
        self.path = path
        self._settings: dict[str, Any] = json.loads(to_json(_values(options)))
        self.goes_on = resume
        if not resume:
            hint = "add --resume to go on with it, or " if (path / _RUN).is_file() else ""
            if path.is_dir() and any(path.iterdir()):
                raise InputError(f"--out {path} exists; {hint}give another folder.")
            check_new(path)
            return
        self._known = self._read()
        for name, value in self._settings.items():
            if name not in _MAY_CHANGE and (then := self._known["settings"].get(name)) != value:
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"{option} was {_shown(then)} in the run in {path}, not {_shown(value)}; give the same."
                )

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its adapter."""
        return (self.path / CONFIG_NAME).is_file()

    @property
    def loss_before(self) -> float | None:
        """The held-out loss before the training that goes on, if it was measured."""
        loss: float | None = self._known["loss_before"]
        return loss

    def checkpoints(self) -> list[Path]:
        """Return the whole checkpoints, in the order of their steps."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        return sorted(filter(is_whole, found), key=lambda path: int(path.name.rpartition("-")[2]))

    def masks(self) -> Masks:
        """Return the masks of the run that goes on."""
        return Masks.load(self.path / _MASKS)

    def check_data(self, examples: Sequence[Mapping[str, list[int]]]) -> None:
        """Raise InputError unless the run that goes on had the same sequences."""
        if self._known["data"] != _digest(examples):
            raise InputError(f"--data gives other sequences than in the run in {self.path}; give the same data.")

    def begin(self, masks: Masks, examples: Sequence[Mapping[str, list[int]]], loss_before: float | None) -> None:
        """Write the settings and the masks.

        Raises:
            InputError: they cannot be written.
        """
        entries = {
            "version": __version__,
            "settings": self._settings,
            "data": _digest(examples),
            "loss_before": loss_before,
        }
        try:
            masks.save(self.path / _MASKS)
            write_file(self.path / _RUN, (to_json(entries, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(f"--out {self.path} cannot be written ({error}); give a folder of yours.") from error

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.path / _RUN).read_text())
            return {name: found[name] for name in ("settings", "data", "loss_before")}
        except FileNotFoundError:
            raise InputError(f"--out {self.path} holds no run to resume; leave --resume out to begin one.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / _RUN} is damaged ({error!r}); begin a new run in another folder."
            ) from error


def dtype_of_run(path: Path) -> torch.dtype | None:
    """Return the dtype of the frozen weights in the run in `path`; None if there is no run."""
    try:
        return torch.bfloat16 if json.loads((path / _RUN).read_text())["settings"]["bf16"] else torch.float32
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _values(options: Sequence[Any]) -> dict[str, Any]:
    return {field.name: getattr(each, field.name) for each in options for field in fields(each)}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "left out" if value is None else str(value)


def _digest(examples: Sequence[Mapping[str, list[int]]]) -> str:
    found = hashlib.sha256()
    for example in examples:
        found.update(repr((example["input_ids"], example["labels"])).encode())
    return found.hexdigest()
