"""The format of an adapter on disk: `sylva_adapter.json` and the one safetensors file that it names.

The JSON file is written last and renamed into place, so that at every moment the directory holds a whole adapter, the
old one or the new one.

For every weight `name`, the tensors are:

| tensor                    | what it holds                                                                          |
| ------------------------- | ---------------------------------------------------------------------------------------- |
| `name/positions`          | `int32[2, nnz]`, where the blocks are                                                  |
| `name/blocks`             | `[nnz, b, b]`, their values, float32 or wider                                          |
| `name/left_positions`     | `int32[2, k]`, where blocks have been and are no more; missing where none have moved   |
| `name/left`               | `[k, b, b]`, the values there, in the weight's dtype; zeros beyond its edge            |

Format 1, of versions before blocks could move, lacks the last two and is read as well.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from sylva_compile.errors import AdapterError, SylvaError
from sylva_compile.files import to_json, write_file

CONFIG_NAME = "sylva_adapter.json"
_FORMAT = "sylva-adapter-2"
_READ = ("sylva-adapter-1", _FORMAT)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Write an adapter; an adapter that is in `directory` already is replaced in one step.

    Args:
        directory: made if missing.
        tensors: by name, contiguous and on the CPU.
        entries: of the JSON file, beside its format, the version of torch and the name and digest of the tensors' file.

    Raises:
        AdapterError: the directory cannot be written. An older adapter stays then.
    """
    content = serialize(dict(tensors))
    digest = hashlib.sha256(content).hexdigest()
    name = f"sylva_adapter-{digest[:12]}.safetensors"
    config = {"format": _FORMAT, "torch": torch.__version__, "tensors": name, "sha256": digest, **entries}
    text = to_json(config, indent=2) + "\n"
    try:
        # Before anything is written: what another process writes meanwhile must stay, and its adapter may win.
        earlier = [old for old in directory.glob("sylva_adapter-*.safetensors") if old.name != name]
        write_file(directory / name, content)
        write_file(directory / CONFIG_NAME, text.encode())
        for old in earlier:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise AdapterError(f"No adapter can be written to {directory} ({error}); give a directory of yours.") from error


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON file and the tensors of an adapter.

    Raises:
        AdapterError: there is no adapter, it is damaged, or another version wrote it.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
        if config["format"] not in _READ:
            raise AdapterError(
                f"{path} has format {config['format']!r}, not {_FORMAT!r}; use the version that wrote it."
            )
        content = (directory / config["tensors"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise AdapterError(
                f"{directory / config['tensors']} is damaged (its checksum differs); save or copy it again."
            )
        tensors = deserialize(content)
        _check_entries(config, tensors)
        return config, tensors
    except FileNotFoundError as error:
        raise AdapterError(f"{error.filename} does not exist; give a directory written by save_adapter.") from None
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        if isinstance(error, SylvaError):
            raise
        raise AdapterError(f"{path} is damaged or no adapter ({error!r}); save or copy it again.") from error


def _check_entries(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise KeyError, TypeError or ValueError where entries and tensors of an adapter do not fit each other."""
    weights = config["weights"]
    if not weights or {f"{name}/blocks" for name in weights} != {key for key in tensors if key.endswith("/blocks")}:
        raise ValueError("its weights are not those of its tensors")
    for name, entry in weights.items():
        size, _, _ = entry["block_size"], entry["dtype"], entry["base"]
        _, _ = entry["shape"]
        for places, values in (("positions", "blocks"), ("left_positions", "left")):
            if places == "positions" or f"{name}/{places}" in tensors:
                found, count = tuple(tensors[f"{name}/{values}"].shape), tensors[f"{name}/{places}"].shape[1]
                if found != (count, size, size):
                    raise ValueError(f"{name} has {values} {found}, not {(count, size, size)}")
    for name in config["modules_to_save"]:
        tensors[f"{name}/whole"]


def copy_adapter(source: Path, directory: Path) -> None:
    """Copy the adapter in `source` to `directory`, in one step; one that is there already is replaced.

    Raises:
        AdapterError: as `read_adapter` and `write_adapter`.
    """
    config, tensors = read_adapter(source)
    written = ("format", "torch", "tensors", "sha256")
    write_adapter(directory, tensors, {name: value for name, value in config.items() if name not in written})
