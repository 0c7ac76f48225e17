"""Pre-train a small GPT-2 from scratch by every method, and keep a row of every run.

    python -m benchmarks.pretraining.run  # goes on if interrupted

The text is the one of the quality harness: the documentation of Python's standard library, and the sentences of SST-2
and CoLA from --data. Every method takes the same steps. At the first seed it begins at one learning rate of a list and
goes on until the best one has tried neighbours; the other seeds use that one. The rate is chosen by the loss on a
validation part, and the table has the loss on a test part. Adapters take the rate of SLoPe, which their training is
until the last steps: they go on from a state that SLoPe's run left in out/pretraining.

Embeddings, norms and biases, which no method prunes, have one learning rate for all methods. A pruned weight wants a
higher rate than a dense one, and if embeddings took that of the weights, the table would compare embeddings. With
`--others 0` they take it. `--width 64` makes a smaller model, which sees more text for each of its weights in the same
time. Adapters have a twelfth of the width as their rank.

Rows go to benchmarks/results/pretraining/rows.jsonl, and a run that has a row is skipped.
`python -m benchmarks.pretraining.table` prints the table and draws the curves.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import parser_of
from benchmarks.pretraining.training import METHODS, Method, Sizes, pretrain, read_text
from benchmarks.quality.rows import Rows
from benchmarks.quality.tasks.small_gpt2 import Recipe
from benchmarks.report import RESULTS, machine
from benchmarks.walk import next_rate

PATH = RESULTS / "pretraining" / "rows.jsonl"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
START, START_SPARSE = 1e-3, 4e-3
OTHERS = 4e-3
SEEDS = (0, 1, 2)
STATES = Path(__file__).resolve().parents[2] / "out" / "pretraining"


def method_of(name: str, sizes: Sizes) -> Method:
    """Return how a line trains a model of these sizes."""
    method = METHODS[name]
    return replace(method, rank=round(sizes.recipe.width / 12)) if method.adapters else method


def add_sizes(parser: ArgumentParser) -> None:
    """Add the options of `sizes_of`."""
    of = "rate of embeddings, norms, biases; 0: the weights' (%(default)s)"
    parser.add_argument("--steps", type=int, default=Sizes().steps, help="of the optimizer (%(default)s)")
    parser.add_argument("--width", type=int, default=Recipe().width, help="of the model (%(default)s)")
    parser.add_argument("--others", type=float, default=OTHERS, help=of)


def sizes_of(options: Namespace) -> Sizes:
    """Return the sizes that the options of a command ask for."""
    recipe = replace(Recipe(), width=options.width)
    return Sizes(recipe, steps=options.steps, others=options.others or None)


def key_of(method: str, learning_rate: float, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Return what a row is known by."""
    return {
        "method": method,
        **asdict(method_of(method, sizes)),
        "learning_rate": learning_rate,
        "seed": seed,
        # Rows from before `others` had one learning rate for all parameters.
        "sizes": {name: value for name, value in asdict(sizes).items() if (name, value) != ("others", None)},
    }


def losses_of(rows: Mapping[str, Any], method: str, seed: int, sizes: Sizes) -> dict[float, float]:
    """Return the validation loss of each learning rate that a method has tried at a seed."""
    found = {}
    for row in rows.values():
        run = row["run"]
        if run == key_of(method, run["learning_rate"], seed, sizes):
            found[run["learning_rate"]] = row["result"]["validation"]
    return found


def without_adapters(method: str) -> str:
    """Return the line whose training that of `method` is until its adapters come."""
    return method.split(",")[0]


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate of the lowest finite loss."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def runs_to_do(rows: Rows, method: str, sizes: Sizes, seeds: int = len(SEEDS)) -> Iterator[tuple[float, int]]:
    """Yield the learning rate and seed of each run of a method that has no row; read the rows anew for each.

    `seeds` is how many of SEEDS to do.

    Raises:
        ValueError: the method has adapters, and the learning rate of SLoPe is not chosen yet.
    """
    tuned = without_adapters(method)
    # A pruned weight wants a higher rate than a dense one.
    start = START_SPARSE if METHODS[method].m else START
    while True:
        losses = losses_of(rows.read(), tuned, SEEDS[0], sizes)
        best = [best_rate(losses)] if losses else []
        rate = next_rate(RATES, start, losses, best)
        if rate is None:
            break
        if tuned != method:
            raise ValueError(f"{method} takes the learning rate of {tuned}; train that first")
        yield rate, SEEDS[0]
    [rate] = best
    for seed in SEEDS[:seeds]:
        if rate not in losses_of(rows.read(), method, seed, sizes):
            yield rate, seed


def main(argv: Sequence[str] | None = None) -> None:
    """Do all runs that have no row yet."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sst2/ and cola/ (%(default)s)")
    of = f"lines to train: {', '.join(map(repr, METHODS))} (all)".replace("%", "%%")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=of)
    add_sizes(parser)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, from the first (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes, rows = sizes_of(options), Rows(PATH)
    # Code that is not committed has no name by which its states could be told from those of other code.
    states = None if str(machine()["commit"]).endswith(("-dirty", "None")) else STATES
    text = read_text(options.data, sizes)
    for method in options.methods:
        for learning_rate, seed in runs_to_do(rows, method, sizes, options.seeds):
            print(f"{method}, learning rate {learning_rate:g}, seed {seed}", flush=True)
            way = method_of(method, sizes)
            result = pretrain(text, sizes, way, learning_rate, seed, lambda line: print(line, flush=True), states)
            date = datetime.now(UTC).isoformat(timespec="seconds")
            rows.append(key_of(method, learning_rate, seed, sizes), result=result, date=date, machine=machine())


if __name__ == "__main__":
    main()
