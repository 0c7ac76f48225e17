"""What a grid file says: which tasks, methods, settings, learning rates and seeds; every combination is a run."""

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


@dataclass(frozen=True)
class Settings:
    """What all runs of a grid share, unless `[vary]` says otherwise.

    Attributes:
        model: "minilm", of writing "small-gpt2", "tiny" (random weights, for tests), or a folder or hub name.
        scope: the weights that methods with a budget may change, as `trace_and_mask` takes it.
        train, validation: examples of the training file to train on, and to choose learning rates on. A hub's data
            know 0 too: all that are left.
        extra_test: further ones that are tested on besides those that the task keeps for that.
        epochs, batch, length: passes over the training examples, examples of a batch, most tokens of an example.
        head_learning_rate: of the classifier, in every method but "head", whose learning rate it is.
        head_steps: steps that the classifier takes alone before anything else happens, in every method.
        sparsity, block_size: they fix the budget, in trainable parameters, of every method that has one.
        samples, partitions, rank: of the trace.
        compile: "none", or the `inner` of the compiler that every model is trained with.
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


_BUDGET = frozenset({"sparsity", "block_size", "scope"})
_TRACE = frozenset({"samples", "partitions", "rank"})


@dataclass(frozen=True)
class Run:
    """One training: the whole of what its result depends on, but for machine and versions.

    Attributes:
        task: a name in `TASKS`, or of a task on a hub's data.
        method: the name that the grid gives it.
        options: `kind`, a name in `METHODS`, and what that takes.
        settings: of the grid.
        learning_rate: of everything but the head.
        seed: of the head, the batches' order, and chance wherever a method uses it.
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
        """The task that the name stands for."""
        return find_task(self.task, self.hub)

    def parts(self) -> dict[str, Any]:
        """All settings that bear on the result; those that this method does not look at are left out."""
        kind = METHODS[self.options["kind"]]
        unused = (set() if kind.has_budget else _BUDGET) | (set() if kind.is_traced(self.options) else _TRACE)
        settings = {name: value for name, value in asdict(self.settings).items() if name not in unused}
        return {
            "task": self.task,
            "method": self.method,
            "options": dict(self.options),
            "settings": settings,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        } | ({"hub": dict(self.hub)} if self.hub else {})

    def key(self) -> str:
        """The same for the same settings, whatever order they are written in."""
        return json.dumps(self.parts(), sort_keys=True)

    def group(self) -> str:
        """The key without learning rate and seed: what a line of a table stands for."""
        return group_of(self.parts())


def group_of(parts: Mapping[str, Any]) -> str:
    """`Run.group` of what `Run.parts` returned."""
    return json.dumps({k: v for k, v in parts.items() if k not in ("learning_rate", "seed")}, sort_keys=True)


class GridError(ValueError):
    """A grid file says something that cannot be run."""


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        name: of the file.
        tasks: names in `TASKS`, or of tasks on a hub's data, each with the settings in which it differs.
        hub: tables of the latter.
        methods: names for the tables, each with its options.
        settings: of every run.
        vary: values of single settings, changed one at a time.
        learning_rates: what every method chooses from.
        seeds: the first one chooses each method's learning rate; all are then reported at that one.
    """

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    hub: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    settings: Settings
    vary: Mapping[str, Sequence[Any]]
    learning_rates: Sequence[float]
    seeds: Sequence[int]

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Read and check a TOML file. Raises GridError for names that mean nothing here."""
        with path.open("rb") as file:
            said = tomllib.load(file)
        known = {"tasks", "methods", "settings", "vary", "learning_rates", "seeds"}
        _check(path, set(said) <= known, f"unknown keys {sorted(set(said) - known)}; use {sorted(known)}")
        missing = known - {"settings", "vary"} - set(said)
        _check(path, not missing, f"{sorted(missing)} missing; add them")
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
        return cls(
            name=path.stem,
            tasks=said["tasks"],
            hub=hub,
            methods=said["methods"],
            settings=Settings(**said.get("settings", {})),
            vary=said.get("vary", {}),
            learning_rates=said["learning_rates"],
            seeds=said["seeds"],
        )

    def about(self, task: str) -> Task:
        """The task that a name stands for."""
        return find_task(task, self.hub.get(task, {}))

    def variations(self, task: str) -> Iterator[Settings]:
        """The settings of a task as they stand, then with one of them changed at a time; each once."""
        settings = replace(self.settings, **self.tasks[task])
        found = {settings: None}
        for name, values in self.vary.items():
            found |= {replace(settings, **{name: value}): None for value in values}
        yield from found

    def groups(self) -> Iterator[Run]:
        """A run, at the first learning rate and seed, for every line of the table; each once."""
        found: dict[str, Run] = {}
        for task in self.tasks:
            for settings, (method, options) in itertools.product(self.variations(task), self.methods.items()):
                hub = self.hub.get(task, {})
                run = Run(task, method, options, settings, self.learning_rates[0], self.seeds[0], hub)
                found.setdefault(run.group(), run)
        yield from found.values()

    def tuning(self, group: Run) -> list[Run]:
        """The runs that choose the learning rate of a line."""
        return [replace(group, learning_rate=rate, seed=self.seeds[0]) for rate in self.learning_rates]

    def reported(self, group: Run, learning_rate: float) -> list[Run]:
        """The runs that a line reports."""
        return [replace(group, learning_rate=learning_rate, seed=seed) for seed in self.seeds]


def best_learning_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """That of the row with the best validation metric; of equals, the one with the lower validation loss.

    A metric that is not a number is worse than any.
    """

    def goodness(row: Mapping[str, Any]) -> tuple[float, float]:
        found = row["result"]["validation"]
        return -math.inf if math.isnan(found["metric"]) else found["metric"], -found["loss"]

    best = max(rows, key=goodness)
    rate: float = best["run"]["learning_rate"]
    return rate


def _check(path: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise GridError(f"{path}: {problem}.")
