"""Results on disk: JSON lines, one for each run, appended and never changed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

FOLDER = RESULTS / "quality"
"""The folder of the rows that the repository keeps."""


class Rows:
    """The rows of a grid and of the other grids in the same folder. Several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        """Use the file `path`, which need not exist yet."""
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the rows of all grids in the folder, by key, so that no grid repeats a run of another.

        A last line that was cut off (power failure) is skipped; the next row starts a new line.
        """
        found: dict[str, dict[str, Any]] = {}
        # This grid's file first, each file in its order: where a run was done twice, the first row counts.
        for path in sorted(self.path.parent.glob("*.jsonl"), key=lambda path: (path != self.path, path)):
            for line in path.read_text().split("\n"):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                found.setdefault(json.dumps(row["run"], sort_keys=True), row)
        return found

    def append(self, run: Mapping[str, Any], **rest: Any) -> None:
        """Add the row of `run` and wait until it is on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"run": dict(run), **rest}, sort_keys=True) + "\n"
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = "\n" + line
            # One write, so that lines of several processes do not mix.
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)
