"""`--config`: a YAML file whose entries are options of the command line."""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sylva_compile.errors import InputError, UsageError


def read_config_file(path: Path, known: Collection[str]) -> list[str]:
    """Return the entries of a YAML file as arguments, to be put before those of the command line.

    An entry is `name: value`, with the name of an option, with dashes or underscores and without the first two dashes.
    A list gives several values, `true` and `false` set or clear a flag, and an empty value counts as not given.

    Args:
        path: of the file.
        known: the names of all options, with underscores.

    Raises:
        InputError: there is no such file, or it is no mapping in YAML.
        UsageError: an entry is no option.
    """
    # Only here, so that the command line starts quickly.
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} cannot be read ({error}); give a YAML file.") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is no YAML ({' '.join(str(error).split())}); mend it.") from None
    if entries is None:
        return []
    if not isinstance(entries, dict):
        raise InputError(f"--config {path} holds a {type(entries).__name__}; give lines such as `lr: 1e-2`.")
    arguments: list[str] = []
    for name, value in entries.items():
        arguments += _as_arguments(path, str(name), value, known)
    return arguments


def _as_arguments(path: Path, name: str, value: Any, known: Collection[str]) -> list[str]:
    key = name.replace("-", "_")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise UsageError(f"--config {path} has the unknown key {name!r}; did you mean {near[0]!r}?")
    option = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [option, *map(str, value)]
    if isinstance(value, dict):
        raise UsageError(f"--config {path}: {name} holds a mapping; give one value.")
    return [f"{option}={value}"]
