"""Tables and plots of the rows of grids.

    python -m benchmarks.quality.tables --grid benchmarks/quality/grids/small.toml

prints the tables of a grid, or of several, writes them to benchmarks/results/quality/<grid>.md, and draws a plot beside
it for each varied setting. With --readme it also puts them into README.md, benchmarks/quality/README.md and
docs/choosing.md, between a comment that asks for them and the next `<!-- end -->`:

    <!-- quality small: begin -->                              all tables
    <!-- quality small without costs: begin -->                those of quality
    <!-- quality small costs alone: begin -->                  those of costs
    <!-- quality small without costs "full" "LoRA": begin -->  only these methods
    <!-- quality pruner summary: begin -->                     a line for each value of a varied setting
"""

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import parser_of
from benchmarks.quality.grid import Grid, Run, Settings, best_learning_rate
from benchmarks.quality.rows import FOLDER, Rows

HERE = Path(__file__).resolve().parent
DOCUMENTS = (HERE.parents[1] / "README.md", HERE / "README.md", HERE.parents[1] / "docs" / "choosing.md")


@dataclass(frozen=True)
class Line:
    """A line of a table: a method with its settings, and its rows at the learning rate that was chosen for it."""

    run: Run
    learning_rate: float
    rows: list[dict[str, Any]]

    def values(self, *path: str) -> list[float]:
        """Return one result for every seed; `path` leads to it, as in `values("test", "metric")`."""
        found: list[Any] = [row["result"] for row in self.rows]
        for name in path:
            found = [each[name] for each in found]
        return found

    def values_if_any(self, name: str) -> list[float]:
        """Return one result for every seed; an empty list if a row is older than this measurement."""
        found = [row["result"].get(name) for row in self.rows]
        return [] if None in found else found

    def middle(self, name: str) -> float:
        """Return the median of a result over seeds."""
        return statistics.median(self.values(name))


def lines_of(grid: Grid, rows: Rows) -> list[Line]:
    """Return the lines whose learning rate is chosen, with the seeds that are done."""
    known = rows.read()
    lines = []
    for group in grid.groups():
        tuning = [known.get(run.key()) for run in grid.tuning(group, known)]
        done = [row for row in tuning if row is not None]
        if len(done) < len(tuning):
            continue
        rate = best_learning_rate(done, grid.choose_by)
        reported = [known[run.key()] for run in grid.reported(group, rate) if run.key() in known]
        lines.append(Line(group, rate, reported))
    return lines


def markdown(grid: Grid, lines: Sequence[Line], quality: bool = True, costs: bool = True) -> str:
    """Return the tables of every task and variation: quality, costs, or both."""
    parts = []
    for task in grid.tasks:
        for settings in grid.variations(task):
            # Methods that do not use a varied setting have one run for all its values.
            shown = [line for line in lines if line.run.task == task and _belongs(line, settings)]
            if shown:
                parts.append(_title(grid, task, settings))
                parts += ([_quality(shown)] if quality else []) + ([_cost(shown)] if costs else [])
    return "\n\n".join(parts) + "\n" if parts else ""


def summary(grid: Grid, lines: Sequence[Line]) -> str:
    """Return a table for every task and varied setting: its values, and metric and loss of each method at them.

    All figures of a table are means over the same seeds, those that every line of it has.
    """
    parts = []
    for task in grid.tasks:
        for name in grid.vary:
            found = _varied(grid, lines, task, name)
            counts = {len(line.rows) for methods in found.values() for line in methods.values()}
            if counts:
                head = [name.replace("_", " "), *grid.methods]
                table = [
                    [str(value), *(_metric_and_loss(methods[m]) if m in methods else "" for m in grid.methods)]
                    for value, methods in found.items()
                ]
                [count] = counts
                title = f"**{task}**: {grid.about(task).metric}, %, and loss; {count} seed{'s' * (count > 1)}"
                parts += [title, _table(head, table)]
    return "\n\n".join(parts) + "\n" if parts else ""


def _metric_and_loss(line: Line) -> str:
    metric = _spread([100 * value for value in line.values("test", "metric")], 1)
    return f"{metric}, {statistics.mean(line.values('test', 'loss')):.3f}"


def _varied(grid: Grid, lines: Sequence[Line], task: str, name: str) -> dict[Any, dict[str, Line]]:
    """Return the lines by value of a varied setting (in order, the default included) and by method.

    They keep only rows of seeds that all of these lines have: a seed is easy or hard for all methods.
    """
    base = next(grid.variations(task))
    found: dict[Any, dict[str, Line]] = {}
    for value in sorted({getattr(base, name), *grid.vary[name]}):
        wanted = replace(base, **{name: value})
        found[value] = {line.run.method: line for line in lines if line.run.task == task and _belongs(line, wanted)}
    seeds = [{row["run"]["seed"] for row in line.rows} for methods in found.values() for line in methods.values()]
    common = set.intersection(*seeds) if seeds else set()
    return {
        value: {
            method: replace(line, rows=[row for row in line.rows if row["run"]["seed"] in common])
            for method, line in methods.items()
        }
        for value, methods in found.items()
    }


def _belongs(line: Line, settings: Settings) -> bool:
    parts = line.run.parts()["settings"]
    wanted = asdict(settings)
    return all(wanted[name] == value for name, value in parts.items())


def _title(grid: Grid, task: str, settings: Settings) -> str:
    usual = asdict(settings)
    base = asdict(next(grid.variations(task)))
    changed = "".join(f", {name} {value}" for name, value in usual.items() if value != base[name])
    changed = changed or f", sparsity {settings.sparsity:g}, block size {settings.block_size}"
    return f"**{task}**{changed}"


def _quality(lines: Sequence[Line]) -> str:
    task = lines[0].run.about()
    # A metric whose tool some machine lacked (METEOR needs Java) gets no column.
    found = [each for line in lines for each in line.values("test", "further")] if task.further else []
    further = [name for name in task.further if all(name in each for each in found)]
    chance = next((line for line in lines if line.run.options == {"kind": "blocks", "trace": "random"}), None)
    head = ["method", "trainable", "learning rate", f"{task.metric}, %", *further, "loss", "over random", "seeds"]
    table = [
        [
            line.run.method,
            f"{line.middle('trainable'):,.0f}",
            f"{line.learning_rate:g}",
            _spread([100 * value for value in line.values("test", "metric")], 1),
            *(_spread(line.values("test", "further", name), 2) for name in further),
            _spread(line.values("test", "loss"), 3),
            "" if chance is None or line is chance else _difference(line, chance),
            str(len(line.rows)),
        ]
        for line in lines
    ]
    return _table(head, table)


def _difference(line: Line, other: Line) -> str:
    """Format the metric minus that of `other`, seed by seed: both have the same head and the same batches."""
    theirs = {row["run"]["seed"]: row["result"]["test"]["metric"] for row in other.rows}
    gaps = [
        100 * (row["result"]["test"]["metric"] - theirs[row["run"]["seed"]])
        for row in line.rows
        if row["run"]["seed"] in theirs
    ]
    return _spread(gaps, 1, sign="+") if gaps else ""


def _cost(lines: Sequence[Line]) -> str:
    head = [
        "method",
        "step of the frozen floor",
        "peak, MiB",
        "saved, MiB",
        "optimizer, MiB",
        "checkpoint, MiB",
        "trace, s",
        "trace, MiB",
    ]
    # The share of nonzero weights, the cost of products where zeros are skipped; 100% for methods that prune nothing.
    pruned = any(value < 0.999 for line in lines for value in line.values_if_any("nonzero"))
    traced = any(line.middle("trace_seconds") >= 0.5 for line in lines)
    table = [
        [
            line.run.method,
            _over_floor(line),
            *(_mebibytes(line, name) for name in ("peak_bytes", "saved_bytes", "state_bytes", "checkpoint_bytes")),
            *([f"{line.middle('trace_seconds'):.0f}", _mebibytes(line, "trace_bytes")] if traced else ["", ""]),
            *([_percent(line.values_if_any("nonzero"))] if pruned else []),
        ]
        for line in lines
    ]
    return _table([*head, "weights left, %"] if pruned else head, table)


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.1f}" if values else ""


def _over_floor(line: Line) -> str:
    """Format the median over seeds of step time / floor time; empty if a row has no floor from the same batches."""
    found = [row["result"].get("beside_floor") for row in line.rows]
    return "" if None in found else f"{statistics.median(each['step_ms'] / each['floor_ms'] for each in found):.2f}"


def _mebibytes(line: Line, name: str) -> str:
    """Format the median over seeds, in MiB."""
    found = line.values_if_any(name)
    return f"{statistics.median(found) / 2**20:.1f}" if found else ""


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Columns without any value are dropped.
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    head, rows = [head[at] for at in kept], [[row[at] for at in kept] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(grid: Grid, lines: Sequence[Line], name: str, path: Path) -> None:
    """Plot the test metric over the values of the varied setting `name`: one curve per method, one panel per task.

    Values stand at equal distances, whether they span decades or crowd below 1; methods are shifted a little apart.
    """
    figure = Figure(figsize=(5 * len(grid.tasks), 4.5), layout="constrained")
    axes = figure.subplots(1, len(grid.tasks), squeeze=False)[0]
    for axis, task in zip(axes, grid.tasks, strict=True):
        found = _varied(grid, lines, task, name)
        for number, method in enumerate(grid.methods):
            aside = 0.4 * ((number + 0.5) / len(grid.methods) - 0.5)
            points = [
                (at + aside, methods[method].values("test", "metric"))
                for at, methods in enumerate(found.values())
                if method in methods
            ]
            if points:
                means = [100 * statistics.mean(values) for _, values in points]
                spread = [100 * statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                places = [place for place, _ in points]
                # The colour depends on the place among all methods, so that methods without rows yet do not shift it.
                style: Any = {"color": f"C{number % 10}", "marker": "osD^v<>pPX"[number % 10]}
                axis.errorbar(places, means, spread, label=method, markersize=4, linewidth=1, capsize=2, **style)
        axis.set(title=task, xlabel=name.replace("_", " "), ylabel=f"{grid.about(task).metric}, %")
        axis.set_xticks(range(len(found)), [str(value) for value in found])
        axis.grid(axis="y", alpha=0.3)
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def places(grid: Grid) -> re.Pattern[str]:
    """Return the pattern of the places where a document asks for tables of `grid`."""
    return re.compile(
        rf"(?P<begin><!-- quality {re.escape(grid.name)}(?P<form> without costs| costs alone| summary)?"
        r'(?P<methods>(?: "[^"]+")*): begin -->\n).*?(?P<end><!-- end -->)',
        re.DOTALL,
    )


def quoted(text: str, grid: Grid, lines: Sequence[Line]) -> str:
    """Return `text` with the tables of `lines` wherever it asks for those of `grid`.

    Raises ValueError where it asks for a method that the grid lacks.
    """

    def tables(found: re.Match[str]) -> str:
        methods = re.findall(r'"([^"]+)"', found["methods"])
        if unknown := set(methods) - set(grid.methods):
            asked = found["begin"].strip()
            raise ValueError(f"{asked} asks for {min(unknown)!r}; {grid.name} has {', '.join(grid.methods)}")
        shown = [line for line in lines if not methods or line.run.method in methods]
        form = found["form"]
        if form == " summary":
            said = summary(grid, shown)
        else:
            said = markdown(grid, shown, quality=form != " costs alone", costs=form != " without costs")
        return found["begin"] + said + found["end"]

    return places(grid).sub(tables, text)


def main(argv: Sequence[str] | None = None) -> str:
    """Print and write the tables of grids."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument(
        "--grid", type=Path, nargs="+", required=True, help="files that benchmarks.quality.run was given"
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the rows (%(default)s)")
    parser.add_argument("--readme", action="store_true", help="put the tables into the documents as well")
    options = parser.parse_args(argv)
    said = []
    for path in options.grid:
        grid = Grid.read(path)
        asking = [document for document in DOCUMENTS if places(grid).search(document.read_text())]
        if options.readme and not asking:
            parser.error(f"put '<!-- quality {grid.name}: begin -->' and '<!-- end -->' where the tables belong")
        lines = lines_of(grid, Rows(options.results / f"{grid.name}.jsonl"))
        tables = "\n".join(filter(None, (summary(grid, lines), markdown(grid, lines))))
        print(tables)
        said.append(tables)
        (options.results / f"{grid.name}.md").write_text(tables)
        for name in grid.vary:
            plot(grid, lines, name, options.results / f"{grid.name}_{name}.png")
        for document in asking if options.readme else ():
            document.write_text(quoted(document.read_text(), grid, lines))
    return "\n".join(said)


if __name__ == "__main__":
    main()
