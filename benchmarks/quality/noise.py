"""How much of the block gain is the model's, and how much the sample's.

    python benchmarks/quality/noise.py --grid benchmarks/quality/grids/long.toml

Traces the first task of a grid twice, on two halves of its samples, and scores every block in three ways: by the gain
of all samples; by what the halves agree on, `½ T ⟨L⁻¹ Γ₁ M⁻ᵀ, L⁻¹ Γ₂ M⁻ᵀ⟩` with L and M of all samples, whose
expectation holds no noise since the halves share none; and by each half's own gain, to see how many of the best blocks
they share. Prints medians over the weights of each kind and writes benchmarks/results/score_noise-*.json.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from grid import Grid
from run import DATA, Runner
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sylva_compile.curvature.estimators import EstimatorChoice, Estimators
from sylva_compile.curvature.importance import GAIN_DAMPING, gain_scores
from sylva_compile.observation import observe
from sylva_compile.scope import input_axes, weights_in_scope

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import print_table, write_results


def agreed_gains(first: Tensor, second: Tensor, a_blocks: Tensor, g_blocks: Tensor, damping: float) -> Tensor:
    """The product of two halves' steps in place of a square; otherwise as `gain_scores`.

    Args:
        first: mean gradient `[m, n]` of one half of the data, float64.
        second: that of the other half.
        a_blocks: as for `gain_scores`.
        g_blocks: likewise.
        damping: likewise.

    Returns:
        `[ceil(m/b), ceil(n/b)]`; negative where the halves disagree.
    """
    # ⟨u, v⟩ = ¼ (‖u + v‖² - ‖u - v‖²)
    total = gain_scores(first + second, a_blocks, g_blocks, damping)
    return (total - gain_scores(first - second, a_blocks, g_blocks, damping)) / 4


def halves(model: nn.Module, batches: Sequence[Any], scope: str, block_size: int) -> dict[str, dict[str, Tensor]]:
    """Of every weight: `gain` and `agreed` of all of `batches`, `first` and `second`, the gains of each half."""
    weights = weights_in_scope(model, scope)
    axes = input_axes(model, weights)
    choice = EstimatorChoice("sylva", "gain", block_size, 1, 1, None)
    parts = []
    for half in (batches[::2], batches[1::2]):
        parts.append(Estimators(weights, axes, choice))
        observe(model, weights, parts[-1], half, num_samples=sum(len(batch["labels"]) for batch in half))
    found = {}
    for name in weights:
        kfacs: list[Any] = [part._estimators[name] for part in parts]
        tokens = torch.stack([each.tokens for each in kfacs])
        shares = tokens / tokens.sum()
        means = [each._means() for each in kfacs]
        a, g = (
            sum(share * mean[at].diagonal_blocks(block_size) for share, mean in zip(shares, means, strict=True))
            for at in (1, 2)
        )
        gradients = [mean[0] for mean in means]
        together = shares[0] * gradients[0] + shares[1] * gradients[1]
        found[name] = {
            "gain": tokens.sum() * gain_scores(together, a, g, GAIN_DAMPING),
            "agreed": tokens.sum() * agreed_gains(*gradients, a, g, GAIN_DAMPING),
            "first": kfacs[0].block_scores(block_size),
            "second": kfacs[1].block_scores(block_size),
        }
    return found


def shared(first: Tensor, second: Tensor, share: float) -> float:
    """Which part of the best `share` of blocks two scores have in common."""
    count = max(1, round(share * first.numel()))
    best = [set(score.flatten().topk(count).indices.tolist()) for score in (first, second)]
    return len(best[0] & best[1]) / count


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trace, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for name, scores in halves(runner.model(run), batches, settings.scope, settings.block_size).items():
        results[name] = {
            "gain": float(scores["gain"].mean()),
            "agreed": float(scores["agreed"].mean()),
            "best_by_gain": shared(scores["gain"], scores["agreed"], share),
            "best_of_halves": shared(scores["first"], scores["second"], share),
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
