"""The state of an interrupted trace on disk, from which it goes on as if nothing had happened."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.files import replacing
from sylva_compile.tracing.observation import TraceProgress

log = logging.getLogger(__name__)

_FORMAT = "sylva-trace-2"


class TraceCheckpoint:
    """One file with all that a trace has gathered, replaced every so many batches and removed at the end.

    It belongs to one trace: the same weights with the same values, the same estimators, and a loader that gives the
    same batches in the same order. All of that is checked.
    """

    def __init__(
        self, path: str | os.PathLike[str], estimators: Estimators, identity: Mapping[str, Any], *, every: int
    ) -> None:
        """Nothing is read or written yet.

        Args:
            path: of the file.
            estimators: whose state it is.
            identity: what the trace depends on, besides its batches; of types that JSON knows.
            every: batches between two writes.
        """
        self.path, self._estimators, self._every = Path(path), estimators, every
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._digest = ""
        self._skipped = 0
        self._random: dict[str, Tensor] = {}

    def resume(self) -> TraceProgress:
        """Load the file into the estimators, if there is one, and return how far it goes.

        Raises:
            ArgumentError: nothing can be written there.
            TraceError: the file is damaged, or belongs to another trace.
        """
        self._check_place()
        if not self.path.exists():
            return TraceProgress()
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise TraceError(f"{self.path} is no checkpoint of a trace by this version; give another path.")
                self._check_identity(json.loads(metadata["identity"]))
                found = json.loads(metadata["progress"])
                self._random = {name: file.get_tensor(name) for name in file.keys() if name.startswith("random/")}  # noqa: SIM118
                self._estimators.load_state(file.get_tensor, json.loads(metadata["sharers"]))
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{self.path} is damaged ({error}); delete it to trace from the start.") from error
        self._digest = metadata["batches"]
        progress = TraceProgress(**found)
        self._skipped = progress.batches
        log.info("%s: going on after %d sequences.", self.path, progress.sequences)
        return progress

    def rest_of(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of `loader` after those that were observed before the interruption.

        Raises:
            TraceError: the loader does not begin with the batches observed before.
        """
        wanted, self._digest = self._digest, ""
        batches = iter(loader)
        for _ in range(self._skipped):
            batch = next(batches, None)
            self._digest = _extend(self._digest, batch)
        if self._digest != wanted:
            raise TraceError(
                f"The loader gives other batches than in the trace that {self.path} comes from; fix its order (a seed, "
                "no shuffling), or delete the file to trace from the start."
            )
        self._restore_random_state()
        for batch in batches:
            self._digest = _extend(self._digest, batch)
            yield batch

    def after_batch(self, progress: TraceProgress) -> None:
        """Write the file if it is time to."""
        if progress.batches % self._every == 0:
            self.write(progress)

    def write(self, progress: TraceProgress) -> None:
        """Write everything gathered; an older file stays until the new one is whole."""
        tensors = self._estimators.state() | _random_state()
        metadata = {
            "format": _FORMAT,
            "identity": json.dumps(self._identity),
            "progress": json.dumps(vars(progress)),
            "sharers": json.dumps(self._estimators.sharers()),
            "batches": self._digest,
        }
        try:
            with replacing(self.path) as beside:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata)
        except (OSError, SafetensorError) as error:
            # What it is for is that the trace is not lost.
            log.warning("%s cannot be written (%s); the trace goes on without it.", self.path, error)

    def remove(self) -> None:
        """The trace is done; its result has taken the file's place."""
        self.path.unlink(missing_ok=True)

    def _check_place(self) -> None:
        """Now and not after the first batches."""
        try:
            if self.path.is_dir():
                raise IsADirectoryError("it is a directory")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ArgumentError(
                f"checkpoint={str(self.path)!r} cannot be written ({error}); name a file in a directory of yours."
            ) from error

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        for key, wanted in self._identity.items():
            if found.get(key) != wanted:
                raise TraceError(
                    f"{self.path} comes from a trace with another {key} ({_short(found.get(key))}, here "
                    f"{_short(wanted)}); trace as before, or give another path."
                )

    def _restore_random_state(self) -> None:
        if not self._random:
            return
        torch.set_rng_state(self._random.pop("random/cpu"))
        if self._random:
            torch.cuda.set_rng_state_all([self._random[f"random/cuda/{at}"] for at in range(len(self._random))])


def _random_state() -> dict[str, Tensor]:
    """For losses that draw random numbers."""
    found = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"random/cuda/{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _extend(digest: str, batch: Any) -> str:
    """The digest of all batches so far, from that of all but the last."""
    return hashlib.sha256("\n".join([digest, *_described(batch)]).encode()).hexdigest()


def _described(batch: Any, inside: tuple[int, ...] = ()) -> Iterator[str]:
    """Everything in `batch` that can be told from other content: tensors, arrays, texts, numbers and their keys.

    `inside` are the objects around it, by `id`: they may refer to each other.
    """
    if isinstance(batch, Tensor):
        yield f"{tuple(batch.shape)}{checksum(batch)}"
    elif isinstance(batch, np.ndarray):
        yield f"{batch.shape}{batch.dtype}{hashlib.sha256(batch.tobytes()).hexdigest()}"
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield repr(key)
            yield from _described(value, inside)
    elif isinstance(batch, list | tuple):
        yield str(len(batch))
        for value in batch:
            yield from _described(value, inside)
    elif isinstance(batch, str | bytes | int | float | None):
        yield repr(batch)
    else:
        # What prints as its address is another in every process.
        yield type(batch).__name__
        if id(batch) not in inside:
            yield from _described(getattr(batch, "__dict__", {}), (*inside, id(batch)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
