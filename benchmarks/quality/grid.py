"""Grid files: they list tasks, methods, settings, learning rates and seeds; every combination is a run."""

import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import METHODS, check_options
from benchmarks.quality.tasks import Task, TaskError, find_task
from benchmarks.walk import next_rate
from sylva_compile.config import SylvaConfig


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of a grid share, unless `[vary]` changes them.

    Attributes:
        model: "minilm"; for tasks of language models "small-gpt2" or "smollm2" (see examples/smollm2.py); "tiny" (of
            random weights, for tests); or a folder or hub name.
        scope: the weights that methods with a budget may change, in the form that `trace_and_mask` takes.
        train, validation: the numbers of examples to train on and to choose learning rates on, from the training file.
            For a hub's data 0 means all that are left.
        extra_test: the number of examples to test on besides those that the task keeps for testing.
        epochs, batch, length: passes over the training examples, examples in a batch, maximum tokens of an example.
        head_learning_rate: the learning rate of the classifier in every method but "head", which uses the run's own.
        head_steps: the number of steps that train the classifier alone before a method starts, the same for all.
        sparsity, block_size: they fix the budget, in trainable parameters, of every method that has one.
        samples, partitions, rank: the settings of the trace.
        compile: "none", or the `inner` of the backend that compiles every model for training.
        layerwise: whether a model is compiled layer by layer, as a deep one has to be.
        cost_batches: the most batches, spread over the training, on which a step is timed beside the frozen floor.
        autocast: whether products are in bfloat16 while a method trains; weights and the tests stay in float32.
    """

    model: str = "minilm"
    scope: str = r".*\bencoder\..*"
    train: int = 1280
    validation: int = 512
    extra_test: int = 0
    epochs: int = 2
    batch: int = 16
    length: int = 64
    head_learning_rate: float = 1e-3
    head_steps: int = 0
    sparsity: float = 0.95
    block_size: int = 16
    samples: int = 256
    partitions: int = 4
    rank: int = 8
    compile: str = "none"
    layerwise: bool = False
    cost_batches: int = 12
    autocast: bool = False

    def trace_config(self, options: Mapping[str, Any]) -> SylvaConfig:
        """Return the settings of a trace for a method with `options`, without its sparsity."""
        return SylvaConfig(
            scope=self.scope,
            block_size=self.block_size,
            num_partitions=self.partitions,
            rank=self.rank,
            num_samples=self.samples,
            method=options["trace"],
            score=options.get("score", "gain"),
            damping=options.get("damping"),
        )


_BUDGET = frozenset({"sparsity", "block_size", "scope"})
_TRACE = frozenset({"samples", "partitions"})
_LATER = {"layerwise": False, "cost_batches": 12, "autocast": False}
"""Settings that came after the first rows, which have the value here and do not name it."""


@dataclass(frozen=True)
class Run:
    """One training run: everything that its result depends on, except for machine and versions.

    Attributes:
        task: a name in `TASKS`, or the name of a task on a hub's data.
        method: the method's name in the grid.
        options: `kind`, a name in `METHODS`, and the options of that kind.
        settings: the settings of the run.
        learning_rate: the learning rate of everything but the head.
        seed: the seed of the head, of the order of batches, and of the method's random choices.
        hub: the table of a task on a hub's data; empty for the others.
    """

    task: str
    method: str
    options: Mapping[str, Any] = field(hash=False)
    settings: Settings
    learning_rate: float
    seed: int
    hub: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def about(self) -> Task:
        """Return the task with the run's name."""
        return find_task(self.task, self.hub)

    def parts(self) -> dict[str, Any]:
        """Return all settings that affect the result, without those that this method does not use."""
        kind = METHODS[self.options["kind"]]
        unused = (set() if kind.has_budget else _BUDGET) | (set() if kind.is_traced(self.options) else _TRACE)
        unused |= set() if kind.has_rank(self.options) else {"rank"}
        settings = {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in unused and (name not in _LATER or value != _LATER[name])
        }
        return {
            "task": self.task,
            "method": self.method,
            "options": dict(self.options),
            "settings": settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        } | ({"hub": dict(self.hub)} if self.hub else {})

    def key(self) -> str:
        """Return `parts` as JSON with sorted keys, so that equal settings give equal keys."""
        return json.dumps(self.parts(), sort_keys=True)

    def group(self) -> str:
        """Return the key without learning rate and seed, which the runs of one table line share."""
        return group_of(self.parts())


def group_of(parts: Mapping[str, Any]) -> str:
    """Return `Run.group` from the result of `Run.parts`."""
    return json.dumps({k: v for k, v in parts.items() if k not in ("learning_rate", "seed")}, sort_keys=True)


Rowset = Mapping[str, Mapping[str, Any]]
"""The rows of runs, by `Run.key`."""


class GridError(ValueError):
    """A grid file asks for something that cannot be run."""


@dataclass(frozen=True)
class Grid:
    """The content of a grid file.

    Attributes:
        name: the name of the file.
        tasks: names in `TASKS`, or names of tasks on a hub's data, each with the settings in which it differs.
        hub: the tables of tasks on a hub's data.
        methods: the methods' names in the tables, each with its options.
        settings: the settings of every run.
        vary: values of single settings, changed one at a time.
        learning_rates: the learning rates that every method chooses from.
        choose_by: "metric" or "loss", the validation result that chooses among them. Metrics of generated text waver
            too much on few examples to choose by.
        walk: whether a line tries the middle one of them first and goes on past the best one until that has tried
            neighbours, and on both sides while all give one metric; otherwise every line tries all.
        walk_from: for single methods, the learning rate to begin with, instead of the middle one.
        seeds: runs with the first seed choose each method's learning rate; all seeds are then reported at that rate.
    """

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    hub: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    settings: Settings
    vary: Mapping[str, Sequence[Any]]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    walk: bool = False
    choose_by: str = "metric"
    walk_from: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Read and check a TOML file. Raises GridError for unknown or missing names."""
        with path.open("rb") as file:
            said = tomllib.load(file)
        known = {"tasks", "methods", "settings", "vary", "learning_rates", "seeds", "walk", "choose_by", "walk_from"}
        _check(path, set(said) <= known, f"unknown keys {sorted(set(said) - known)}; use {sorted(known)}")
        missing = known - {"settings", "vary", "walk", "choose_by", "walk_from"} - set(said)
        _check(path, not missing, f"{sorted(missing)} missing; add them")
        choose_by = said.get("choose_by", "metric")
        _check(path, choose_by in ("metric", "loss"), f"choose_by={choose_by!r}; use 'metric' or 'loss'")
        hub = {name: table.pop("hub") for name, table in said["tasks"].items() if "hub" in table}
        for name in said["tasks"]:
            try:
                find_task(name, hub.get(name, {}))
            except TaskError as error:
                raise GridError(f"{path}: task {name!r}: {error}.") from error
        names = {each.name for each in fields(Settings)}
        tables = {"settings": said.get("settings", {}), "vary": said.get("vary", {})}
        for title, table in (tables | {f"tasks.{name}": table for name, table in said["tasks"].items()}).items():
            strange = set(table) - names
            _check(path, not strange, f"unknown names {sorted(strange)} in [{title}]; use {sorted(names)}")
        for name, options in said["methods"].items():
            problem = check_options(options)
            _check(path, problem is None, f"method {name!r}: {problem}")
        walk_from = said.get("walk_from", {})
        for name, rate in walk_from.items():
            _check(path, said.get("walk", False), "walk_from without walk = true; add it")
            _check(path, name in said["methods"], f"walk_from names {name!r}; use names of [methods]")
            _check(path, rate in said["learning_rates"], f"walk_from {name!r}: {rate} is not one of learning_rates")
        return cls(
            name=path.stem,
            tasks=said["tasks"],
            hub=hub,
            methods=said["methods"],
            settings=Settings(**said.get("settings", {})),
            vary=said.get("vary", {}),
            learning_rates=said["learning_rates"],
            seeds=said["seeds"],
            walk=said.get("walk", False),
            choose_by=choose_by,
            walk_from=walk_from,
        )

    def about(self, task: str) -> Task:
        """Return the task of this name."""
        return find_task(task, self.hub.get(task, {}))

    def variations(self, task: str) -> Iterator[Settings]:
        """Yield the settings of a task, first unchanged, then with one of them changed at a time; each once."""
        settings = replace(self.settings, **self.tasks[task])
        found = {settings: None}
        for name, values in self.vary.items():
            found |= {replace(settings, **{name: value}): None for value in values}
        yield from found

    def groups(self) -> Iterator[Run]:
        """Yield one run, with the first learning rate and seed, for every line of the tables; each once."""
        found: dict[str, Run] = {}
        for task in self.tasks:
            for settings, (method, options) in itertools.product(self.variations(task), self.methods.items()):
                hub = self.hub.get(task, {})
                run = Run(task, method, options, settings, self.learning_rates[0], self.seeds[0], hub)
                found.setdefault(run.group(), run)
        yield from found.values()

    def only(self, methods: Sequence[str]) -> "Grid":
        """Return the grid with these of its methods, or all if none is named.

        Raises:
            GridError: the grid has no such method.
        """
        if unknown := [name for name in methods if name not in self.methods]:
            raise GridError(f"{self.name} has no method {unknown[0]!r}; it has {', '.join(map(repr, self.methods))}")
        return replace(self, methods={name: self.methods[name] for name in methods}) if methods else self

    def tuning(self, group: Run, rows: Rowset) -> list[Run]:
        """Return the runs that choose the learning rate of a line, with `rows` the rows of runs by `Run.key`.

        Where the grid walks, more runs may follow from the rows of these; when all have rows, the choice is made.
        """
        runs = [replace(group, learning_rate=rate, seed=self.seeds[0]) for rate in sorted(self.learning_rates)]
        if not self.walk:
            return runs
        rates = [run.learning_rate for run in runs]
        tried = {run.learning_rate: rows[run.key()] for run in runs if run.key() in rows}
        metrics = {row["result"]["validation"]["metric"] for row in tried.values()}
        if self.choose_by == "metric" and len(metrics) == 1:
            # Where all rates give the same constant answer, none is the best.
            best = list(tried)
        else:
            best = [best_learning_rate(list(tried.values()), self.choose_by)] if tried else []
        following = next_rate(rates, self.walk_from.get(group.method, rates[len(rates) // 2]), tried, best)
        return [run for run in runs if run.learning_rate in tried or run.learning_rate == following]

    def reported(self, group: Run, learning_rate: float) -> list[Run]:
        """Return the runs that a line reports."""
        return [replace(group, learning_rate=learning_rate, seed=seed) for seed in self.seeds]


def best_learning_rate(rows: Sequence[Mapping[str, Any]], choose_by: str = "metric") -> float:
    """Return the learning rate of the row with the best validation metric, or the lowest loss; see `Grid.choose_by`.

    Among equal metrics the lower validation loss wins. NaN is worse than any number.
    """

    def goodness(row: Mapping[str, Any]) -> tuple[float, float]:
        found = row["result"]["validation"]
        metric, loss = (-math.inf if math.isnan(value) else value for value in (found["metric"], -found["loss"]))
        return (loss, metric) if choose_by == "loss" else (metric, loss)

    best = max(rows, key=goodness)
    rate: float = best["run"]["learning_rate"]
    return rate


def _check(path: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise GridError(f"{path}: {problem}.")
