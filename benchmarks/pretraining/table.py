"""Print the table of the pre-trainings, and draw their loss curves.

    python -m benchmarks.pretraining.table  # from the rows of benchmarks.pretraining.run

Both are written beside the rows, as benchmarks/results/pretraining/600-steps.md and .png, with a width that is not the
usual one in the name, and another rate of embeddings, or "one-rate" for `--others 0`. Where adapters have a learning
rate of their own, it is the second one. The share of the gap is what adapters win back of the loss between SLoPe and
dense training, where dense training is ahead by more than the spread of the seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import parser_of
from benchmarks.pretraining.run import (
    OTHERS,
    PATH,
    SEEDS,
    add_sizes,
    best_rate,
    key_of,
    losses_of,
    sizes_of,
    without_adapters,
)
from benchmarks.pretraining.training import METHODS, Sizes
from benchmarks.quality.rows import Rows
from benchmarks.quality.tasks.small_gpt2 import Recipe


def chosen(rows: Mapping[str, Any], method: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Return the rows of a method at its best learning rates, by seed; none before they are known."""
    losses = losses_of(rows, without_adapters(method), SEEDS[0], sizes)
    if not losses:
        return []
    weights, adapters = best_rate(losses), None
    if METHODS[method].adapters:
        of_adapters = losses_of(rows, method, SEEDS[0], sizes, weights)
        adapters = best_rate(of_adapters) if of_adapters else None
    wanted = [
        key_of(method, weights, seed, sizes, each)
        for seed in SEEDS
        # Rows from before adapters had a rate of their own.
        for each in ({adapters, None} if adapters == weights else {adapters})
    ]
    return sorted((row for row in rows.values() if row["run"] in wanted), key=lambda row: row["run"]["seed"])


def table_of(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the table as Markdown."""
    losses = {method: {row["run"]["seed"]: row["result"]["test"] for row in rows} for method, rows in lines.items()}
    dense = losses.get("dense", {})
    text = ["| method | learning rate | test loss | folded | behind dense | of the gap | seeds |"]
    text.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, rows in lines.items():
        if not rows:
            continue
        test, sparse = losses[method], losses.get(without_adapters(method), {})
        folded = [row["result"]["test, folded"] for row in rows if "test, folded" in row["result"]]
        behind = [test[seed] - dense[seed] for seed in test if seed in dense]
        common = [seed for seed in test if METHODS[method].adapters and seed in dense and seed in sparse]
        gaps = [sparse[seed] - dense[seed] for seed in common]
        gained = [sparse[seed] - test[seed] for seed in common]
        # A gap within the spread of the seeds is none.
        is_gap = bool(gaps) and statistics.mean(gaps) > (statistics.stdev(gaps) if len(gaps) > 1 else 0.0)
        cells = [
            method,
            _rates(rows[0]["run"]),
            _spread(list(test.values())),
            _spread(folded),
            "" if method == "dense" else _spread(behind),
            f"{100 * sum(gained) / sum(gaps):.0f}%" if is_gap else "",
            str(len(test)),
        ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _rates(run: Mapping[str, Any]) -> str:
    of_adapters = f", {run['adapter_rate']:g}" if "adapter_rate" in run else ""
    return f"{run['learning_rate']:g}{of_adapters}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def curves_of(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw the validation loss over the steps, the mean of the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, rows in lines.items():
        curves = [row["result"]["curve"] for row in rows]
        if curves:
            steps = [step for step, _ in curves[0]]
            means = [statistics.mean(curve[at][1] for curve in curves) for at in range(len(steps))]
            axes.plot(steps, means, label=method)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and the picture."""
    parser = parser_of(__spec__, __doc__)
    add_sizes(parser)
    rows, sizes = Rows(PATH).read(), sizes_of(parser.parse_args(argv))
    lines = {method: chosen(rows, method, sizes) for method in METHODS}
    text = table_of(lines)
    print(text)
    parts = [f"{sizes.steps}-steps"]
    parts += [f"width-{sizes.recipe.width}"] if sizes.recipe.width != Recipe().width else []
    if sizes.others != OTHERS:
        parts.append("one-rate" if sizes.others is None else f"others-{sizes.others:g}")
    name = "-".join(parts)
    (PATH.parent / f"{name}.md").write_text(text)
    curves_of(lines).savefig(PATH.parent / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
