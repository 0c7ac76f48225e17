"""Checkpoints of a trace: a file from which an interrupted trace continues and ends with the same masks."""

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
from sylva_compile.tracing.progress import TraceProgress

log = logging.getLogger(__name__)

_FORMAT = "sylva-trace-2"


class TraceCheckpoint:
    """One file with the whole state of a trace, replaced every `every` batches and removed at the end.

    A checkpoint belongs to one trace: the same weights with the same values, the same estimators, and a loader that
    gives the same batches in the same order. All of that is checked.
    """

    def __init__(
        self, path: str | os.PathLike[str], estimators: Estimators, identity: Mapping[str, Any], *, every: int
    ) -> None:
        """Describe the checkpoint; nothing is read or written yet.

        Args:
            path: the path of the file.
            estimators: the estimators whose state the file holds.
            identity: the facts that the trace depends on, besides its batches; of types that JSON knows.
            every: the number of batches between two writes.
        """
        self.path, self._estimators, self._every = Path(path), estimators, every
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._digest = ""
        self._skipped = 0
        self._random: dict[str, Tensor] = {}

    def resume(self) -> TraceProgress:
        """Load the file, if it exists, into the estimators, and return the progress that it holds.

        Raises:
            ArgumentError: the file cannot be written.
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
        """Yield the batches of `loader` after those that were observed before the interruption.

        Raises:
            TraceError: the loader does not begin with the batches that were observed before the interruption.
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
        """Write the file after every `every` batches."""
        if progress.batches % self._every == 0:
            self.write(progress)

    def write(self, progress: TraceProgress) -> None:
        """Write the whole state of the trace; an older file stays until the new one is complete."""
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
            # The checkpoint protects the trace, so a failed write must not end it.
            log.warning("%s cannot be written (%s); the trace goes on without it.", self.path, error)

    def remove(self) -> None:
        """Delete the file, once the trace is done and its masks are made."""
        self.path.unlink(missing_ok=True)

    def _check_place(self) -> None:
        """Raise ArgumentError if the file cannot be written: at the start, not after the first batches."""
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
    """Return the states of the random generators of the CPU and the GPUs, since a loss may draw random numbers."""
    found = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"random/cuda/{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _extend(digest: str, batch: Any) -> str:
    """Return the digest of all batches so far, from the digest of the earlier ones and the last batch."""
    return hashlib.sha256("\n".join([digest, *_described(batch)]).encode()).hexdigest()


def _described(batch: Any, inside: tuple[int, ...] = ()) -> Iterator[str]:
    """Yield texts that identify the content of `batch`: its tensors, arrays, strings, numbers and keys.

    `inside` holds the `id` of every enclosing object, since objects may refer to each other.
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
        # The repr of such an object holds its address, which differs from process to process.
        yield type(batch).__name__
        if id(batch) not in inside:
            yield from _described(getattr(batch, "__dict__", {}), (*inside, id(batch)))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
