"""Plot the loss of training over time, and tell how far each method has come at equal times.

    python -m benchmarks.quality.over_time --grid benchmarks/quality/grids/e2e_long.toml

draws benchmarks/results/quality/<grid>_time.png and prints a table. Time is counted in forward and backward passes of
the frozen model, beside which every run has timed its steps: a method at 1.5 of this floor has taken two steps after
3. Losses are those of the training batches at the learning rate that was chosen for the line, as running means over a
tenth of the steps, averaged over seeds. Learning rates fall to zero over the steps of a run, so a method whose steps
take longer is further from the end of its fall at an equal time.

`--methods` chooses lines. Rows of before losses were kept have none, and are left out. Where a grid trains uncompiled
models, `--costs GRID` takes the time of a step from a grid of the same methods that compiles them.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid, GridError
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.quality.tables import Line, lines_of
from benchmarks.report import markdown

AT = (0.25, 0.5, 1.0)
"""The times of the table, as shares of the time that the fastest of the methods takes in all."""


@dataclass(frozen=True)
class Curve:
    """The loss of one line of a grid over its steps.

    Attributes:
        method: of the line.
        step: the time of a step, in passes of the frozen model.
        losses: of every step, a running mean, averaged over seeds.
    """

    method: str
    step: float
    losses: Sequence[float]

    @property
    def times(self) -> list[float]:
        """The time at the end of every step."""
        return [self.step * (at + 1) for at in range(len(self.losses))]

    def at(self, time: float) -> float | None:
        """Return the loss of the last step that has ended by `time`; None before the first."""
        done = min(int(time / self.step + 1e-9), len(self.losses))
        return self.losses[done - 1] if done else None


def step_of(line: Line) -> float:
    """Return the median time of a step of a line, in passes of the frozen model; all rows have been timed beside it."""
    times = [row["result"]["beside_floor"] for row in line.rows]
    return statistics.median(each["step_ms"] / each["floor_ms"] for each in times)


def curve_of(line: Line, step: float | None = None) -> Curve | None:
    """Return the curve of a line; None where a row has no losses or no time beside the floor, or has diverged.

    `step` is the time of a step; None: that of the line.
    """
    results = [row["result"] for row in line.rows]
    if not results or any(not each.get("losses") or not each.get("beside_floor") for each in results):
        return None
    if len({len(each["losses"]) for each in results}) > 1:
        return None
    width = max(1, len(results[0]["losses"]) // 10)
    means = [statistics.mean(losses) for losses in zip(*(each["losses"] for each in results), strict=True)]
    smooth = [statistics.mean(means[max(0, at + 1 - width) : at + 1]) for at in range(len(means))]
    return Curve(line.run.method, step_of(line) if step is None else step, smooth)


def table(curves: Sequence[Curve]) -> str:
    """Return the losses of `curves` at equal times, and at the end of each."""
    most = min(curve.times[-1] for curve in curves)
    rows = []
    for curve in curves:
        found = [curve.at(share * most) for share in AT]
        shown = ["" if loss is None else f"{loss:.3f}" for loss in found]
        rows.append([curve.method, f"{curve.step:.2f}", *shown, f"{curve.losses[-1]:.3f}"])
    return markdown(["method", "step of the frozen floor", *(f"at {share * most:.0f}" for share in AT), "end"], rows)


def plot(curves: Sequence[Curve], title: str, path: Path) -> None:
    """Draw the losses over steps and over time, both without the first tenth."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, curve in enumerate(curves):
        first = len(curve.losses) // 10
        places = ([at + 1 for at in range(len(curve.losses))], curve.times)
        for axis, xs in zip(axes, places, strict=True):
            axis.plot(xs[first:], curve.losses[first:], color=f"C{number % 10}", linewidth=1.2, label=curve.method)
    axes[0].set(title=title, xlabel="steps", ylabel="loss of training batches, running mean", yscale="log")
    axes[1].set(title="at equal time", xlabel="time, in passes of the frozen model")
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> str:
    """Draw the plot of a grid, and print and return its table."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--grid", type=Path, required=True, help="the file that benchmarks.quality.run was given")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (%(default)s)")
    parser.add_argument("--methods", nargs="+", default=[], help="methods of the grid (all)")
    parser.add_argument("--costs", type=Path, help="a grid to take the time of a step from (the same)")
    options = parser.parse_args(argv)
    try:
        grid = Grid.read(options.grid).only(options.methods)
    except GridError as error:
        parser.error(str(error))
    chosen = lines_of(grid, Rows(options.results / f"{grid.name}.jsonl"))
    costs = {}
    if options.costs:
        compiled = Grid.read(options.costs)
        costs = {
            line.run.method: step_of(line)
            for line in lines_of(compiled, Rows(options.results / f"{compiled.name}.jsonl"))
        }
        if missing := {line.run.method for line in chosen} - set(costs):
            parser.error(f"{compiled.name} has no row of {min(missing)!r}; choose others by --methods, or run it")
    curves = [curve for line in chosen if (curve := curve_of(line, costs.get(line.run.method))) is not None]
    if not curves:
        parser.error(f"no line of {grid.name} has kept losses; run benchmarks.quality.run first")
    if len({line.run.task for line in chosen}) > 1 or grid.vary:
        parser.error(f"{grid.name} has several tasks or settings; choose a grid of one")
    plot(curves, f"{grid.name}: {chosen[0].run.task}", options.results / f"{grid.name}_time.png")
    said = table(curves)
    print(said)
    return said


if __name__ == "__main__":
    main()
