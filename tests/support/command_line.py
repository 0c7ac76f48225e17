"""What tests of the command line share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

QUICK = ["--block-size", "8", "--sparsity", "0.9", "--num-samples", "8", "--batch-size", "4"]
TRAIN = [*QUICK, *["--inner", "aot_eager", "--steps", "4", "--lr", "1e-2"]]


class Said(NamedTuple):
    """What a command left: its exit code, and its lines."""

    code: int
    out: str
    err: str


class Place(NamedTuple):
    """Files that tests read and do not change."""

    model: Path
    table: Path
    run: Path


Command = Callable[..., Said]
