"""The output of every benchmark: a printed table, and a dated JSON file that names the machine and the versions."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None

RESULTS = Path(__file__).resolve().parent / "results"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column holds names and the others figures; plain text without rich."""
    if Console is None:
        print("\n".join([title, *("  ".join(cell.rjust(12) for cell in row) for row in [columns, *rows])]))
        return
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 140).print(table)


def machine() -> dict[str, Any]:
    """Return the machine and the versions that a measurement depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft", "bitsandbytes")},
        "commit": _commit(),
    }


def write_results(name: str, settings: Mapping[str, Any], results: Any) -> Path:
    """Write `benchmarks/results/<name>-<UTC time>.json` and return its path; an older file is never overwritten."""
    RESULTS.mkdir(exist_ok=True)
    moment = datetime.now(UTC)
    path = RESULTS / f"{name}-{moment:%Y%m%dT%H%M%S}.json"
    row = {
        "benchmark": name,
        "date": moment.isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": dict(settings),
        "results": results,
    }
    with path.open("x") as file:
        json.dump(row, file, indent=2)
        file.write("\n")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return SYLVA_COMMIT (set it for a copy without history), or the commit, "-dirty" if the code differs."""
    if "SYLVA_COMMIT" in os.environ:
        return os.environ["SYLVA_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=True
        ).stdout

    try:
        # New result files of benchmarks do not change the code.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
        return git("describe", "--always").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose first column holds names and the others figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
