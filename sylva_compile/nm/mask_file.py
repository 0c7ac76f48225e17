"""The file of N:M masks: one safetensors file with the kept columns of each weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from sylva_compile.errors import MaskError
from sylva_compile.files import to_json, write_file
from sylva_compile.nm.mask import NMMask

_FORMAT = "sylva-nm-masks-1"


def write_masks(path: Path, masks: Mapping[str, NMMask], notes: Mapping[str, Any]) -> None:
    """Write `masks` and `notes`, beside `path` first and then renamed. Raises MaskError where that cannot be done."""
    shapes = {name: [*mask.shape, mask.n, mask.m, mask.input_axis] for name, mask in masks.items()}
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "notes": to_json(dict(notes))}
    try:
        write_file(path, serialize({name: mask.columns for name, mask in masks.items()}, metadata))
    except OSError as error:
        raise MaskError(f"No masks can be written to {path} ({error}); name a file in a directory of yours.") from error


def read_masks(path: Path) -> tuple[dict[str, NMMask], dict[str, Any]]:
    """Read what `write_masks` wrote. Raises MaskError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise MaskError(f"{path} holds no N:M masks of this version; give a file written by NMMasks.save.")
            shapes = json.loads(metadata["shapes"])
            masks = {
                name: NMMask((rows, cols), n, m, axis, file.get_tensor(name))
                for name, (rows, cols, n, m, axis) in shapes.items()
            }
            notes: dict[str, Any] = json.loads(metadata["notes"])
            return masks, notes
    except OSError as error:
        raise MaskError(f"{path} cannot be read ({error}); give a file written by NMMasks.save.") from error
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"{path} is damaged or no mask file ({error}); make the masks again.") from error
