"""Measure which share of the total gain of all blocks the best blocks hold: a bound for any choice of blocks.

    python -m benchmarks.quality.concentration --grid benchmarks/quality/grids/long.toml

Traces the first task of a grid in several parts, each with as many samples as the grid sets. The gain of the first part
chooses blocks, as a trace of the grid would. The other parts measure the gain of these blocks by products of different
parts, which are free of noise (`parts.agreed_gains`). The best blocks by that measure itself profit from its own noise,
so their share is larger than any score could find. Prints shares of the total gain, and writes
benchmarks/results/concentration-*.json.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid
from benchmarks.quality.parts import agreed_gains, best, together, trace_parts
from benchmarks.quality.runner import DATA, Runner
from benchmarks.report import print_table, write_results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trace, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="its first task and settings")
    parser.add_argument("--parts", type=int, default=7, help="of the trace, 3 or more (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of the head and the order of the sentences (%(default)s)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets in files (%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    if options.parts < 3:
        parser.error("--parts: one chooses and two measure, so give 3 or more")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run = replace(next(Grid.read(options.grid).groups()), seed=options.seed)
    samples, size = run.settings.samples, run.settings.batch
    train = max(run.settings.train, options.parts * samples)
    run = replace(run, settings=replace(run.settings, train=train))
    settings, runner = run.settings, Runner(options.data)
    batches = runner.batches(run, 1000 * run.seed + 999)
    each = samples // size
    groups = [batches[at * each : (at + 1) * each] for at in range(options.parts)]
    share = 1 - settings.sparsity
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, parts in trace_parts(runner.model(run), groups, settings.scope, settings.block_size).items():
        # "encoder.layer.3.output.dense.weight" is of the kind "output.dense".
        kind = name.rpartition("layer.")[2].partition(".")[2].removesuffix(".weight")
        worth = together(parts[1:]).tokens * agreed_gains(parts[1:])
        for key in ("all weights", kind):
            sums[key]["all"] += float(worth.sum())
            sums[key]["chosen"] += float(worth.flatten()[best(parts[0].gain(), share)].sum())
            sums[key]["best"] += float(worth.flatten()[best(worth, share)].sum())
    results = {
        key: {"chosen": row["chosen"] / row["all"], "best": row["best"] / row["all"]} for key, row in sums.items()
    }
    rows = [[key, *(f"{100 * row[name]:.1f}%" for name in ("chosen", "best"))] for key, row in results.items()]
    title = f"{run.task}: of what blocks could win, the best {share:.1%} hold"
    print_table(title, ["weights", f"chosen by {samples} samples", "at most"], rows)
    if not options.no_write:
        about = {"grid": options.grid.stem, "task": run.task, "samples": samples, "parts": options.parts}
        about |= {"share": share, "seed": options.seed}
        print(f"written to {write_results('concentration', about, results)}")
    return results


if __name__ == "__main__":
    main()
