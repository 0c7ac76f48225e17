"""`sylva-compile inspect`: what an adapter or a file of masks holds, as tables or as JSON."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sylva_compile.adapters.format import CONFIG_NAME, read_adapter
from sylva_compile.blocks.masks import Masks
from sylva_compile.cli.options import InspectConfig
from sylva_compile.errors import InputError
from sylva_compile.files import to_json
from sylva_compile.reports.weight_names import places_of

_NOT_SETTINGS = ("base", "versions", "moves", "schedule", "adapter")
"""Entries of the masks that are shown by themselves."""


def run(options: InspectConfig) -> int:
    """Print, and return the exit code."""
    found = inspect(options.path)
    print(to_json(found, indent=2) if options.json else as_text(found))
    return 0


def inspect(path: Path) -> dict[str, Any]:
    """Return what an adapter's folder or a file of masks holds, in values that JSON knows.

    Its entries are "kind" ("adapter" or "masks"), "path", "bytes", "base" (a fingerprint), "versions", "settings",
    "moves", "schedule", "trained", "weights" (each with its name, shape, block size, blocks, and elements that are
    trained now and that ever were), and of an adapter "modules_to_save", the names of tensors that it holds whole.

    Raises:
        InputError: nothing is there.
        AdapterError, MaskError: it cannot be read.
    """
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _adapter(path)
    if path.is_file():
        masks = Masks.load(path)
        weights = [
            _weight(name, mask.shape, mask.block_size, mask.positions, mask.positions) for name, mask in masks.items()
        ]
        return _whole("masks", path, path.stat().st_size, masks.config, weights)
    what = f"holds no {CONFIG_NAME}" if path.exists() else "does not exist"
    raise InputError(f"{path} {what}; give the folder of an adapter or of a finished run, or a file of masks.")


def as_text(found: Mapping[str, Any]) -> str:
    """Return what `inspect` returned as text for a terminal: some lines, and tables by kind of weight and by layer."""
    trained = found["trained"]
    shares = f"{trained['now'] / trained['of']:.2%}), {trained['ever'] / trained['of']:.2%} at any time"
    facts = {
        found["kind"]: f"{found['path']}, {found['bytes'] / 2**20:.2f} MiB",
        "base": found["base"] or "not known",
        "settings": _pairs(found["settings"]) or "not known",
        "versions": _pairs(found["versions"]) or "not known",
        "moves": f"{found['moves']}" + (f" ({_pairs(found['schedule'])})" if found["schedule"] else ""),
        "trained": f"{trained['now']:,} of {trained['of']:,} elements ({shares}",
    }
    if found.get("modules_to_save"):
        facts["whole"] = ", ".join(found["modules_to_save"])
    lines = []
    for name, fact in facts.items():
        wrapped = textwrap.wrap(fact, 70, break_long_words=False, break_on_hyphens=False)
        lines += [f"{first:<10}{line}" for first, line in zip([name] + [""] * len(wrapped), wrapped, strict=False)]
    places = places_of(weight["name"] for weight in found["weights"])
    for title, key in (("kind", lambda name: places[name].kind), ("layer", _layer_of)):
        lines += ["", *_table(title, _grouped(found["weights"], key))]
    return "\n".join(line.rstrip() for line in lines)


def _adapter(path: Path) -> dict[str, Any]:
    config, tensors = read_adapter(path)
    weights = []
    for name, entry in config["weights"].items():
        positions = tensors[f"{name}/positions"]
        left = tensors.get(f"{name}/left_positions", positions[:, :0])
        weights.append(_weight(name, entry["shape"], entry["block_size"], positions, left, left_only=True))
    size = sum((path / file).stat().st_size for file in (CONFIG_NAME, config["tensors"]))
    found = _whole("adapter", path, size, config.get("masks") or {}, weights)
    return found | {"modules_to_save": list(config["modules_to_save"])}


def _whole(kind: str, path: Path, size: int, masks: Mapping[str, Any], weights: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": str(path),
        "bytes": size,
        "base": masks.get("base"),
        "versions": masks.get("versions") or {},
        "settings": {name: value for name, value in masks.items() if name not in _NOT_SETTINGS},
        "moves": masks.get("moves", 0),
        "schedule": masks.get("schedule"),
        "trained": {
            "now": sum(weight["now"] for weight in weights),
            "ever": sum(weight["ever"] for weight in weights),
            "of": sum(math.prod(weight["shape"]) for weight in weights),
        },
        "weights": weights,
    }


def _weight(
    name: str, shape: Iterable[int], block_size: int, positions: Tensor, places: Tensor, *, left_only: bool = False
) -> dict[str, Any]:
    """Describe a weight whose blocks are at `positions int[2, nnz]`; `places` are all, or those that blocks left."""
    rows, cols = shape
    now, other = (_elements(each, rows, cols, block_size) for each in (positions, places))
    return {
        "name": name,
        "shape": [rows, cols],
        "block_size": block_size,
        "blocks": positions.shape[1],
        "now": now,
        "ever": now + other if left_only else other,
    }


def _elements(positions: Tensor, rows: int, cols: int, block_size: int) -> int:
    """Return the number of elements of the blocks that lie inside the weight."""
    heights = (rows - positions[0].long() * block_size).clamp(max=block_size)
    widths = (cols - positions[1].long() * block_size).clamp(max=block_size)
    return int((heights * widths).sum())


def _layer_of(name: str) -> str:
    """Return the layer of a weight, "model.layers.3", or "-"."""
    match = re.match(r"^(.*?\.\d+)\.", name)
    return match[1] if match else "-"


def _grouped(weights: list[dict[str, Any]], key: Callable[[str], str]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for weight in weights:
        groups.setdefault(key(weight["name"]), []).append(weight)
    return groups


def _table(title: str, groups: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table with a row for each group of weights."""
    rows: list[tuple[str, ...]] = [(title, "weights", "blocks", "trained", "ever")]
    for name, weights in groups.items():
        of = sum(math.prod(weight["shape"]) for weight in weights)
        shares = (f"{sum(weight[when] for weight in weights) / of:.2%}" for when in ("now", "ever"))
        blocks = f"{sum(weight['blocks'] for weight in weights):,}"
        rows.append((name, str(len(weights)), blocks, *shares))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
