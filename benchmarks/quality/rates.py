"""Plot what each method of a grid comes to at every learning rate that was tried, at the seed that chose among them.

    python -m benchmarks.quality.rates --grid benchmarks/quality/grids/e2e.toml

draws benchmarks/results/quality/<grid>_rates.png, one panel per task, and prints how wide each method's range of good
rates is: the factor between the lowest and the highest one that was tried whose validation loss is within `--within` of
the best. Where that range meets an end of what was tried, a ">" says that it may be wider.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid, GridError
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.report import markdown

Losses = Mapping[float, float]
"""Validation losses by learning rate, in ascending order; infinite where a run diverged."""


def tried(grid: Grid, rows: Mapping[str, Mapping[str, Any]], task: str) -> dict[str, Losses]:
    """Return the losses of every method of a grid without varied settings, for the rates that have a row."""
    found = {}
    for group in grid.groups():
        if group.task == task:
            runs = ((rate, grid.reported(group, rate)[0]) for rate in sorted(grid.learning_rates))
            known = ((rate, rows.get(run.key())) for rate, run in runs)
            losses = {rate: _loss(row) for rate, row in known if row is not None}
            if losses:
                found[group.method] = losses
    return found


def good(losses: Losses, within: float) -> tuple[float, bool]:
    """Return the factor between the ends of the range of good rates, and whether it may be wider.

    The range is the run of neighbours about the best rate whose losses are at most `within` above the best one.
    """
    rates = list(losses)
    best = min(range(len(rates)), key=lambda at: losses[rates[at]])
    most = losses[rates[best]] + within
    low = high = best
    while low > 0 and losses[rates[low - 1]] <= most:
        low -= 1
    while high + 1 < len(rates) and losses[rates[high + 1]] <= most:
        high += 1
    return rates[high] / rates[low], low == 0 or high + 1 == len(rates)


def table(found: Mapping[str, Losses], within: float) -> str:
    """Return the best rate and the range of good rates of every method."""
    rows = []
    for method, losses in found.items():
        best = min(losses, key=lambda rate: losses[rate])
        factor, open_ended = good(losses, within)
        rows.append([method, f"{best:g}", f"{losses[best]:.3f}", f"{'>' * open_ended}{factor:.2g}", str(len(losses))])
    columns = ["method", "best rate", "validation loss", f"factor within {within:g}", "rates tried"]
    return markdown(columns, rows)


def plot(panels: Mapping[str, Mapping[str, Losses]], methods: Sequence[str], path: Path) -> None:
    """Draw the losses over the learning rates, a panel for each task, up to a fifth above the worst method's best."""
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, found) in zip(axes, panels.items(), strict=True):
        for number, method in enumerate(methods):
            points = [(rate, loss) for rate, loss in found.get(method, {}).items() if math.isfinite(loss)]
            if points:
                style: Any = {"color": f"C{number % 10}", "marker": "osD^v<>pPX"[number // 10 % 10]}
                axis.plot(*zip(*points, strict=True), label=method, markersize=4, linewidth=1, **style)
        bests = [min(losses.values()) for method, losses in found.items() if method in methods]
        if bests := list(filter(math.isfinite, bests)):
            axis.set_ylim(0.98 * min(bests), 1.2 * max(bests))
        axis.set(title=task, xscale="log", xlabel="learning rate", ylabel="validation loss")
        axis.grid(alpha=0.3)
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _loss(row: Mapping[str, Any]) -> float:
    loss = row["result"]["validation"]["loss"]
    return float(loss) if math.isfinite(loss) else math.inf


def main(argv: Sequence[str] | None = None) -> str:
    """Draw the plot of a grid, and print and return its tables."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="the file that benchmarks.quality.run was given")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=[], help="methods of the grid (all)")
    parser.add_argument("--within", type=float, default=0.05, help="of the best validation loss (%(default)s)")
    options = parser.parse_args(argv)
    try:
        grid = Grid.read(options.grid).only(options.methods)
    except GridError as error:
        parser.error(str(error))
    if grid.vary:
        parser.error(f"{grid.name} varies settings; choose a grid that does not")
    rows = Rows(options.results / f"{grid.name}.jsonl").read()
    panels = {task: tried(grid, rows, task) for task in grid.tasks}
    if not any(panels.values()):
        parser.error(f"no run of {grid.name} has a row; run benchmarks.quality.run first")
    plot(panels, list(grid.methods), options.results / f"{grid.name}_rates.png")
    said = "\n\n".join(f"**{task}**\n\n{table(found, options.within)}" for task, found in panels.items() if found)
    print(said)
    return said


if __name__ == "__main__":
    main()
