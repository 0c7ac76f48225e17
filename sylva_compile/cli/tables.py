"""The rows of --data: read from a CSV, TSV, JSON, JSONL or text file, or from a data set on the hub."""

import csv
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sylva_compile.cli.hub import may_be_on_the_hub
from sylva_compile.errors import InputError

Row = Mapping[str, Any]

_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(source: str, split: str, subset: str | None) -> Sequence[Row] | str:
    """Return the rows of a table, or a text file as one text.

    Args:
        source: a file, or the name of a data set on the hub.
        split: of a data set on the hub.
        subset: of a data set on the hub.

    Raises:
        InputError: there is no such file or data set, or it is not readable as UTF-8 or as a table.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"--data {source} is a folder; give a file, or the name of a data set on the hub.")
    if path.is_file():
        try:
            return _read_file(path)
        except UnicodeDecodeError:
            raise InputError(f"--data {path} is not UTF-8; convert it first.") from None
        except csv.Error as error:
            raise InputError(f"--data {path} is no table: {error}; mend it, or rename it to .txt.") from None
        except json.JSONDecodeError as error:
            raise InputError(f"--data {path} is no JSON: {error}; mend it, or rename it to .txt.") from None
    if path.suffix.lower() in (*_SEPARATORS, ".json", ".jsonl", ".txt", ".md") or not may_be_on_the_hub(source):
        raise InputError(f"--data {source} is no file; give a CSV, TSV, JSON, JSONL or text file.")
    return _read_hub(source, split, subset)


def _read_file(path: Path) -> Sequence[Row] | str:
    kind = path.suffix.lower()
    if kind in _SEPARATORS:
        with path.open(encoding="utf-8-sig", newline="") as file, _fields_of_any_length():
            table = csv.DictReader(file, delimiter=_SEPARATORS[kind])
            if not table.fieldnames:
                raise InputError(f"--data {path} is empty; give a table with a first line of column names.")
            return list(table)
    text = path.read_text(encoding="utf-8-sig")
    if kind == ".json":
        rows = json.loads(text)
    elif kind == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        return text
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"--data {path} is no list of objects; give one object for each row.")
    return rows


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Let the csv module read long texts meanwhile."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_hub(name: str, split: str, subset: str | None) -> Sequence[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            f"--data {name} is no file, and data sets on the hub need the package: `pip install datasets`."
        )
    # Only here: files need no such package.
    import datasets

    datasets.disable_progress_bars()
    try:
        rows: Sequence[Row] = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--data {name} is no file, and no data set on the hub can be read: {reason}") from error
    return rows
