"""Measure how much of the block gain comes from the model, and how much from noise of the sample.

    python -m benchmarks.quality.noise --grid benchmarks/quality/grids/long.toml

Traces the first task of a grid twice, on two halves of its samples, and scores every block in three ways: by the gain
of all samples; by the gain that the halves agree on, `½ T ⟨L⁻¹ Γ₁ M⁻ᵀ, L⁻¹ Γ₂ M⁻ᵀ⟩` with L and M of all samples, whose
expectation is free of noise since the halves share no sample; and by each half's own gain, to count the best blocks
that the halves share. Prints medians over the weights of each kind and writes benchmarks/results/score_noise-*.json.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid
from benchmarks.quality.parts import agreed_gains, best, together, trace_parts
from benchmarks.quality.runner import DATA, Runner
from benchmarks.report import print_table, write_results


def shared(first: Tensor, second: Tensor, share: float) -> float:
    """Return the fraction of the best `share` of blocks that two scores have in common."""
    chosen = [set(best(score, share).tolist()) for score in (first, second)]
    return len(chosen[0] & chosen[1]) / len(chosen[0])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trace, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="its first task and settings, at its first seed")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets in files (%(default)s)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    run = next(Grid.read(options.grid).groups())
    settings, runner = run.settings, Runner(options.data)
    batches = runner.batches(run, 1000 * run.seed + 999)[: settings.samples // settings.batch]
    share = 1 - settings.sparsity
    results = {}
    traced = trace_parts(runner.model(run), (batches[::2], batches[1::2]), settings.scope, settings.block_size)
    for name, halves in traced.items():
        whole = together(halves)
        gain, agreed = whole.gain(), whole.tokens * agreed_gains(halves)
        results[name] = {
            "gain": float(gain.mean()),
            "agreed": float(agreed.mean()),
            "best_by_gain": shared(gain, agreed, share),
            "best_of_halves": shared(halves[0].gain(), halves[1].gain(), share),
        }
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, row in results.items():
        # "encoder.layer.3.output.dense.weight" is of the kind "output.dense".
        kinds.setdefault(name.rpartition("layer.")[2].partition(".")[2].removesuffix(".weight"), []).append(row)
    columns = ["mean gain", "that halves agree on", "best in common with those", "best in common of the halves"]
    rows = [
        [kind, *(f"{statistics.median(row[key] for row in found):.2f}" for key in found[0])]
        for kind, found in kinds.items()
    ]
    print_table(f"{run.task}, {settings.samples} samples, medians over weights", ["weights", *columns], rows)
    if not options.no_write:
        about = {"grid": options.grid.stem, "task": run.task, "samples": settings.samples, "share": share}
        print(f"written to {write_results('score_noise', about, results)}")
    return results


if __name__ == "__main__":
    main()
