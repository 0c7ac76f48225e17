"""One HTML page about a training, without any other file: pictures and tables are inside of it."""

import base64
import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sylva_compile.errors import ReportError
from sylva_compile.files import write_file
from sylva_compile.reports.changes import WeightChange
from sylva_compile.reports.history import History
from sylva_compile.reports.pictures import curves, heat_maps, shares_by_kind, shares_by_layer

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2429; background: #fff; margin: 0 auto; max-width: 70rem;
  padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { max-width: 46rem; } .quiet { color: #5b666e; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1.4rem 0 0;
  padding: 0; list-style: none; }
.tiles li { background: #f3f5f6; border-radius: .4rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .wide svg, .wide img { display: block; max-width: none; }
.wide img { width: min(100%, var(--width)); min-width: min(var(--width), 40rem); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
.pair img { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #e3e7ea; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } summary { cursor: pointer; }
"""


def write_report(
    path: str | os.PathLike[str],
    changes: Sequence[WeightChange],
    *,
    title: str = "Where training changed the model",
    settings: Mapping[str, Any] | None = None,
    history: History | None = None,
) -> None:
    """Write a page with heat maps of the changes, their shares, the training's curves, and a table of all weights.

    Args:
        path: the HTML file; its directory is made if missing, and an older file is replaced in one step.
        changes: what `changes_of` returns.
        title: the page's heading.
        settings: the settings that chose the blocks, such as `Masks.config`.
        history: the training's curves; None leaves them out.

    Raises:
        ReportError: there are no changes, or the file cannot be written.
    """
    if not changes:
        raise ReportError("There is no weight to report; give the changes of a model that carries blocks.")
    history = history or History()
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">{html.escape(_origin(settings or {}))}</p>',
        _tiles(changes, history),
        "<h2>Where and how much</h2>",
        "<p>Each small rectangle is a block of a weight as it is stored. Its row tells the outputs, its column the "
        "inputs (in a Conv1D, as GPT-2 has it, the other way round); the layers stand below one another. Grey blocks "
        "were never trained.</p>",
        _picture(heat_maps(changes), "wide", "Heat maps of the change of every block, by kind of weight and layer"),
        "<h2>Shares</h2>",
        "<p>A bar that is higher than its grey neighbour marks a part of the model that changed more than its size "
        "alone would make it.</p>",
        '<div class="pair">',
        _picture(shares_by_kind(changes), "", "Shares of the squared change by kind of weight"),
        _picture(shares_by_layer(changes), "", "Shares of the squared change by layer"),
        "</div>",
        _curves(history),
        "<h2>Weights</h2>",
        f"<details><summary>{len(changes)} weights</summary>{_table(changes)}</details>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts)
    )
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (page + "\n</body></html>\n").encode())
    except OSError as error:
        raise ReportError(f"No report can be written to {path} ({error}); give a file in a folder of yours.") from error


def _origin(settings: Mapping[str, Any]) -> str:
    words = [
        f"{name.replace('_', ' ')} {settings[name]}" for name in ("method", "score", "sparsity") if name in settings
    ]
    if "versions" in settings:
        words += [f"{name} {version}" for name, version in settings["versions"].items()]
    return ", ".join(words)


def _tiles(changes: Sequence[WeightChange], history: History) -> str:
    elements = sum(each.shape[0] * each.shape[1] for each in changes)
    blocks = sum(each.change.numel() for each in changes)
    tiles = [
        (f"{sum(int(each.present.sum()) for each in changes) / blocks:.1%}", "of the blocks train at a time"),
        (f"{sum(each.trained for each in changes) / blocks:.1%}", "of the blocks have been trained"),
        (
            f"{(sum(each.squares for each in changes) / elements) ** 0.5:.2e}",
            "root mean square change of these weights",
        ),
    ]
    if history.moves:
        tiles.append((f"{history.moves[-1][1]:.0f}", "moves of the blocks"))
    for name, curve in (("training loss", history.loss), ("held-out loss", history.held_out)):
        if curve:
            tiles.append((f"{curve[0][1]:.3f} → {curve[-1][1]:.3f}", name))
    items = "".join(f"<li><b>{html.escape(value)}</b>{html.escape(name)}</li>" for value, name in tiles)
    return f'<ul class="tiles">{items}</ul>'


def _curves(history: History) -> str:
    losses = {name: curve for name, curve in (("training", history.loss), ("held out", history.held_out)) if curve}
    figures: list[tuple[Figure, str]] = []
    if losses:
        figures.append((curves(losses, "loss"), "Loss over the steps"))
    if history.places:
        figures.append(
            (curves({"": history.places}, "share of blocks trained so far"), "Share of blocks trained so far")
        )
    if history.importance:
        figures.append((curves(history.importance, "score of a layer"), "Scores of the layers over the steps"))
    if not figures:
        return ""
    pictures = "".join(_picture(figure, "", alt) for figure, alt in figures)
    return f'<h2>Over the steps</h2><div class="pair">{pictures}</div>'


def _picture(figure: Figure, kind: str, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    data = base64.b64encode(file.getvalue()).decode()
    width = f"{figure.get_figwidth() * 96:.0f}px"
    return f'<div class="{kind}" style="--width: {width}"><img alt="{alt}" src="data:image/png;base64,{data}"></div>'


def _table(changes: Iterable[WeightChange]) -> str:
    head = ("weight", "shape", "block", "blocks now", "ever trained", "of all", "root mean square change")
    rows = [
        (
            each.name,
            f"{each.shape[0]} × {each.shape[1]}",
            str(each.block_size),
            str(int(each.present.sum())),
            str(each.trained),
            f"{each.trained / each.change.numel():.1%}",
            f"{(each.squares / (each.shape[0] * each.shape[1])) ** 0.5:.2e}",
        )
        for each in changes
    ]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{body}</table></div>'
