"""Pictures of a training, as figures of matplotlib: heat maps of the changes, shares, curves."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sylva_compile.reports.changes import WeightChange, by_kind
from sylva_compile.reports.history import Curve

UNTRAINED = "#e3e7ea"
COLOURS = colormaps["viridis"].with_extremes(bad=UNTRAINED)
_TICKS = 6
_NAMED = 10


def heat_maps(changes: Sequence[WeightChange]) -> Figure:
    """Draw the change of every block: a column for each kind of weight, with all layers below one another."""
    kinds = by_kind(changes)
    tall = max(map(len, kinds.values()))
    figure = Figure(figsize=(1.6 + 1.5 * len(kinds), 1.8 + 0.3 * max(tall, 4)), layout="constrained")
    # nan_to_num makes zeros of blocks that were never trained, and of those that are not finite.
    top = max(float(each.change.nan_to_num(posinf=0.0).max()) for each in changes) or 1.0
    image = None
    for axis, (kind, found) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        maps = _stacked(found).clip(max=top)
        image = axis.imshow(maps, cmap=COLOURS, aspect="auto", interpolation="nearest", vmin=0.0, vmax=top)
        _label_layers(axis, found)
        across = found[0].change.shape
        axis.set_title(f"{kind.replace('.', chr(10))}\n{across[0]} × {across[1]}", fontsize=8)
        axis.set_xticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    if any(each.layer is not None for each in changes):
        figure.supylabel("layer", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, shrink=0.4, pad=0.02, anchor=(0.0, 1.0))
    bar.set_label("root mean square change of a block", fontsize=8, loc="top")
    bar.ax.tick_params(labelsize=7)
    return figure


def shares_by_kind(changes: Sequence[WeightChange]) -> Figure:
    """Draw each kind's share of the squared change, beside its share of the elements."""
    return _bars("by kind of weight", by_kind(changes))


def shares_by_layer(changes: Sequence[WeightChange]) -> Figure:
    """Draw each layer's share of the squared change, beside its share of the elements."""
    layers: dict[str, list[WeightChange]] = {}
    for each in changes:
        layers.setdefault(each.layer_name or "–", []).append(each)
    return _bars("by layer", layers)


def curves(named: Mapping[str, Curve], label: str) -> Figure:
    """Draw curves over the optimizer's steps; `label` names their values.

    Up to ten have a legend; more are dark for the first and light for the last.
    """
    figure = Figure(figsize=(6.0, 3.0), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["viridis"](np.linspace(0.0, 0.9, max(len(named), 2)))
    for colour, (name, curve) in zip(colours, named.items(), strict=False):
        steps, values = zip(*curve, strict=True)
        axis.plot(steps, values, color=colour, marker="o" if len(curve) < 30 else None, markersize=3, label=name)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if 1 < len(named) <= _NAMED:
        axis.legend(fontsize=7, frameon=False)
    elif len(named) > _NAMED:
        axis.set_title(f"dark: {next(iter(named))}; light: {list(named)[-1]}", fontsize=7)
    return figure


def _stacked(found: Sequence[WeightChange]) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Return the maps of several layers below one another, with a line of NaN between them."""
    columns = max(each.change.shape[1] for each in found)
    parts = []
    for each in found:
        rows, wide = each.change.shape
        parts.append(torch.full((rows + 1, columns), float("nan"), dtype=torch.float64))
        parts[-1][:rows, :wide] = each.change
    stacked: np.ndarray[tuple[int, int], np.dtype[np.float64]] = torch.cat(parts)[:-1].numpy()
    return stacked


def _label_layers(axis: Axes, found: Sequence[WeightChange]) -> None:
    heights = [each.change.shape[0] + 1 for each in found]
    middles = [sum(heights[:at]) + (height - 2) / 2 for at, height in enumerate(heights)]
    every = -(-len(found) // _TICKS)
    shown = [at for at, each in enumerate(found) if at % every == 0 and each.layer is not None]
    axis.set_yticks([middles[at] for at in shown], [str(found[at].layer) for at in shown], fontsize=7)


def _sums(found: Sequence[WeightChange]) -> tuple[float, float]:
    return sum(each.squares for each in found), float(sum(each.shape[0] * each.shape[1] for each in found))


def _bars(title: str, groups: Mapping[str, Sequence[WeightChange]]) -> Figure:
    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    axis = figure.subplots()
    sums = {name: _sums(found) for name, found in groups.items()}
    change, size = (sum(column) or 1.0 for column in zip(*sums.values(), strict=True))
    places = np.arange(len(sums))
    axis.bar(places - 0.2, [c / change for c, _ in sums.values()], 0.4, color="#2a788e", label="of the squared change")
    axis.bar(places + 0.2, [s / size for _, s in sums.values()], 0.4, color="#c5ccd1", label="of the elements")
    every = 1 if len(sums) <= 12 else -(-len(sums) // 10)
    names = [name if at % every == 0 else "" for at, name in enumerate(sums)]
    long = any(len(name) > 3 for name in names)
    axis.set_xticks(places, names, fontsize=7, rotation=40 if long else 0, ha="right" if long else "center")
    axis.set_title(title, fontsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure
