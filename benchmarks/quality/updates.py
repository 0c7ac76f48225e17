"""Compare what methods of a grid change in the weights: how much, of what rank, and how far they agree.

    python -m benchmarks.quality.updates --grid benchmarks/quality/grids/e2e.toml --reference "linear, Muon 0.8" \
        --methods "LoRA, Muon 0.8" "random, Muon 0.8" "moving, Muon 0.8"

trains again by each method, at the learning rate that the grid's rows chose and at its first seed, and prints a line
for each. D is the change of a weight from before training to after it, R that of the reference method:

    size      |D| / |R|, Frobenius norms over all weights in scope
    cosine    <D, R> / (|D| |R|), over all weights. The reference at the grid's second seed shows how far two
              trainings of one method agree
    rank      |D|^2 / s^2 with the largest singular value s of D, the median over the weights (the stable rank)
    touched   the share of the values that are not as before
    reach     the share of |R|^2 in the values that were touched

Rows and plots of the grid are left as they are.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid, Run
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.quality.runner import DATA, Runner
from benchmarks.quality.tables import lines_of
from benchmarks.quality.training import optimizer_of, train
from benchmarks.report import markdown
from sylva_compile.blocks.scope import weights_in_scope

Change = Mapping[str, Tensor]
"""The change of each weight in scope, `[m, n]`, by name."""


@dataclass(frozen=True)
class Comparison:
    """The change of a method beside that of the reference; the module's docstring says what the figures are."""

    size: float
    cosine: float
    rank: float
    touched: float
    reach: float


def change_of(runner: Runner, run: Run) -> dict[str, Tensor]:
    """Train as `run` says, uncompiled, and return the change of every weight in its scope."""
    model = runner.model(run)
    before = {name: w.detach().clone() for name, w in weights_in_scope(model, run.settings.scope).items()}
    ready = runner.prepare(run, model)
    optimizer = optimizer_of(ready, run.learning_rate, run.settings.head_learning_rate)
    train(ready, runner.steps(run), optimizer, autocast=run.settings.autocast)
    trained: Any = ready.model
    if hasattr(trained, "merge_and_unload"):
        trained = trained.merge_and_unload()
    return {name: trained.get_parameter(name).detach() - was for name, was in before.items()}


def compare(change: Change, reference: Change) -> Comparison:
    """Compare two changes of the same weights."""
    both = [(change[name].double(), theirs.double()) for name, theirs in reference.items()]
    mine, theirs = sum(_energy(a) for a, _ in both), sum(_energy(b) for _, b in both)
    product = sum(float((a * b).sum()) for a, b in both)
    ranks = [_energy(a) / float(torch.linalg.matrix_norm(a, 2)) ** 2 for a, _ in both if bool(a.any())]
    return Comparison(
        size=(mine / theirs) ** 0.5,
        cosine=product / (mine * theirs) ** 0.5 if mine else 0.0,
        rank=statistics.median(ranks) if ranks else 0.0,
        touched=sum(int(a.count_nonzero()) for a, _ in both) / sum(a.numel() for a, _ in both),
        reach=sum(_energy(b[a != 0]) for a, b in both) / theirs,
    )


def _energy(change: Tensor) -> float:
    return float(change.square().sum())


def table(found: Mapping[str, Comparison]) -> str:
    """Return a line for each comparison."""
    rows = [
        [name, f"{c.size:.2f}", f"{c.cosine:.3f}", f"{c.rank:.1f}", f"{c.touched:.1%}", f"{c.reach:.1%}"]
        for name, c in found.items()
    ]
    return markdown(["method", "size", "cosine", "rank", "touched", "reach"], rows)


def main(argv: Sequence[str] | None = None) -> str:
    """Train by every method, and print and return the table."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="the file that benchmarks.quality.run was given")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets in files (%(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (%(default)s)")
    parser.add_argument("--task", help="a task of the grid (its first)")
    parser.add_argument("--reference", required=True, help="the method that the others are compared with")
    parser.add_argument("--methods", nargs="+", required=True, help="methods of the grid")
    parser.add_argument("--threads", type=int, help="threads that torch uses")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    grid = Grid.read(options.grid)
    task = options.task or next(iter(grid.tasks))
    lines = lines_of(grid, Rows(options.results / f"{grid.name}.jsonl"))
    chosen = {line.run.method: line for line in reversed(lines) if line.run.task == task}
    for name in (options.reference, *options.methods):
        if name not in chosen:
            parser.error(f"{grid.name} has no tuned line {name!r} of {task}; it has {', '.join(chosen) or 'none'}")
    runner = Runner(options.data)

    def trained(name: str, seed: int) -> dict[str, Tensor]:
        line = chosen[name]
        run = grid.reported(line.run, line.learning_rate)[seed]
        print(f"{name}, learning rate {run.learning_rate:g}, seed {run.seed}", flush=True)
        return change_of(runner, run)

    reference = trained(options.reference, 0)
    found = {options.reference: compare(reference, reference)}
    if len(grid.seeds) > 1:
        found[f"{options.reference}, another seed"] = compare(trained(options.reference, 1), reference)
    for name in itertools.filterfalse(found.__contains__, options.methods):
        found[name] = compare(trained(name, 0), reference)
    said = table(found)
    print(said)
    return said


if __name__ == "__main__":
    main()
