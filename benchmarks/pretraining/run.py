"""Pre-train a small GPT-2 from scratch by every method, and keep a row of every run.

    python -m benchmarks.pretraining.run  # goes on if interrupted

The text is the one of the quality harness: the documentation of Python's standard library, and the sentences of SST-2
and CoLA from --data. Every method takes the same steps. At the first seed it begins at one learning rate of a list and
goes on until the best one has tried neighbours; the other seeds use that one. The rate is chosen by the loss on a
validation part, and the table has the loss on a test part. The weights of a run with adapters have the rate of SLoPe,
which it is until the last steps: it goes on from a state that SLoPe's run left in out/pretraining. Adapters have a rate
of their own, walked in the same way.

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


def method_of(name: str, sizes: Sizes, adapter_rate: float | None = None) -> Method:
    """Return how a line trains a model of these sizes."""
    method = METHODS[name]
    rank = round(sizes.recipe.width / 12)
    return replace(method, rank=rank, adapter_rate=adapter_rate) if method.adapters else method


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


def key_of(
    method: str, learning_rate: float, seed: int, sizes: Sizes, adapter_rate: float | None = None
) -> dict[str, Any]:
    """Return what a row is known by."""
    found = {
        "method": method,
        **asdict(method_of(method, sizes, adapter_rate)),
        "learning_rate": learning_rate,
        "seed": seed,
        # Rows from before `others` had one learning rate for all parameters.
        "sizes": {name: value for name, value in asdict(sizes).items() if (name, value) != ("others", None)},
    }
    # In rows from before it, adapters have the rate of the weights.
    return {name: value for name, value in found.items() if (name, value) != ("adapter_rate", None)}


def losses_of(
    rows: Mapping[str, Any], method: str, seed: int, sizes: Sizes, weights: float | None = None
) -> dict[float, float]:
    """Return the validation loss of each learning rate that a method has tried at a seed.

    With adapters these are the rates of the adapters, where the weights have the rate `weights`.
    """
    found = {}
    for row in rows.values():
        run = row["run"]
        rate, adapter_rate = run["learning_rate"], run.get("adapter_rate")
        if run == key_of(method, rate, seed, sizes, adapter_rate) and weights in (None, rate):
            found[rate if adapter_rate is None else adapter_rate] = row["result"]["validation"]
    return found


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the learning rate of the lowest finite loss."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def without_adapters(method: str) -> str:
    """Return the line whose training that of `method` is until its adapters come."""
    return method.split(",")[0]


def next_to_try(
    rows: Rows, method: str, sizes: Sizes, start: float, weights: float | None = None
) -> tuple[float | None, float]:
    """Return the rate that a method tries next at the first seed, or None, and the best one so far."""
    losses = losses_of(rows.read(), method, SEEDS[0], sizes, weights)
    best = best_rate(losses) if losses else start
    return next_rate(RATES, start, losses, [best]), best


def runs_to_do(
    rows: Rows, method: str, sizes: Sizes, seeds: int = len(SEEDS)
) -> Iterator[tuple[float, int, float | None]]:
    """Yield the learning rate, the seed and the adapters' rate of each run of a method that has no row.

    `seeds` is how many of SEEDS to do.

    Raises:
        ValueError: the method has adapters, and the learning rate of SLoPe is not chosen yet.
    """
    trunk = without_adapters(method)
    # A pruned weight wants a higher rate than a dense one.
    start = START_SPARSE if METHODS[method].m else START
    while True:
        rate, weights = next_to_try(rows, trunk, sizes, start)
        if rate is None:
            break
        if trunk != method:
            raise ValueError(f"{method} takes the learning rate of {trunk}; train that first")
        yield rate, SEEDS[0], None
    adapters = None
    while trunk != method:
        rate, adapters = next_to_try(rows, method, sizes, START, weights)
        if rate is None:
            break
        yield weights, SEEDS[0], rate
    for seed in SEEDS[:seeds]:
        tried = losses_of(rows.read(), method, seed, sizes, weights)
        if (weights if adapters is None else adapters) not in tried:
            yield weights, seed, adapters


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
        for learning_rate, seed, adapter_rate in runs_to_do(rows, method, sizes, options.seeds):
            of_adapters = "" if adapter_rate is None else f", of adapters {adapter_rate:g}"
            print(f"{method}, learning rate {learning_rate:g}{of_adapters}, seed {seed}", flush=True)
            way = method_of(method, sizes, adapter_rate)
            result = pretrain(text, sizes, way, learning_rate, seed, lambda line: print(line, flush=True), states)
            date = datetime.now(UTC).isoformat(timespec="seconds")
            key = key_of(method, learning_rate, seed, sizes, adapter_rate)
            rows.append(key, result=result, date=date, machine=machine())


if __name__ == "__main__":
    main()
