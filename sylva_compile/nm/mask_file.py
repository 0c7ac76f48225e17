"""The file of N:M masks: one safetensors file with the codes of each weight's kept columns."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sylva_compile.embedded.mask_file import MaskFile
from sylva_compile.nm.mask import NMMask

_FILE = MaskFile("sylva-nm-masks-2", "N:M masks", "NMMasks.save", older=("sylva-nm-masks-1",))
"""Version 1 has columns as numbers, int16 or int32, in place of codes."""


def write_masks(path: str | os.PathLike[str], masks: Mapping[str, NMMask], notes: Mapping[str, Any]) -> None:
    """Write `masks` and `notes`. Raises MaskError where that cannot be done."""
    shapes = {name: [*mask.shape, mask.n, mask.m, mask.input_axis] for name, mask in masks.items()}
    _FILE.write(path, {name: mask.codes for name, mask in masks.items()}, {"shapes": shapes, "notes": notes})


def read_masks(path: str | os.PathLike[str]) -> tuple[dict[str, NMMask], dict[str, Any]]:
    """Read what `write_masks` wrote. Raises MaskError for any other file."""

    def make(places: dict[str, Tensor], found: dict[str, Any]) -> tuple[dict[str, NMMask], dict[str, Any]]:
        masks = {
            name: (NMMask if places[name].dtype == torch.uint8 else NMMask.from_columns)(
                (rows, cols), n, m, axis, places[name]
            )
            for name, (rows, cols, n, m, axis) in found["shapes"].items()
        }
        return masks, {key: found["notes"][key] for key in ("double", "config")}

    return _FILE.read(path, make)
