"""Arguments of a command line from the fields of dataclasses, and dataclasses from parsed arguments.

A field tells its name, type, default and help (`metadata["help"]`) once. transformers' HfArgumentParser does the same
for other metadata and simpler types; it refuses those of `SylvaConfig`.
"""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")

_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "TEXT"}


def add_fields(parser: argparse.ArgumentParser, title: str, options: type, omit: Sequence[str] = ()) -> None:
    """Add an argument for every field of a dataclass, as a group of the help.

    `block_size` becomes `--block-size`. A field with `metadata["positional"]` has no dashes, a bool becomes a pair
    (`--bf16`, `--no-bf16`), a Literal has choices, and a field that may be a string or a list takes several values.

    Args:
        parser: gets the arguments.
        title: of the group.
        options: a dataclass.
        omit: fields that the command line does not offer.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name in omit:
            continue
        wanted: dict[str, Any] = {"help": _help(field), **_kind(hints[field.name])}
        if "metavar" in field.metadata:
            wanted["metavar"] = field.metadata["metavar"]
        if field.metadata.get("positional"):
            group.add_argument(field.name, **wanted)
            continue
        if field.default is dataclasses.MISSING:
            wanted["required"] = True
        else:
            wanted["default"] = field.default
        group.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **wanted)


def make(options: type[_T], found: argparse.Namespace) -> _T:
    """Return the dataclass `options` with the values that were parsed; fields that were omitted keep their defaults."""
    values = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if hasattr(found, field.name):
            value = getattr(found, field.name)
            values[field.name] = _one_or_several(value) if isinstance(value, list) else value
    return options(**values)


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata["help"].replace("%", "%%")
    shown = field.default is not dataclasses.MISSING and field.default is not None and field.type is not bool
    return f"{text} ({field.default})" if shown else text


def _kind(hint: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for values of the type `hint`."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint), "metavar": "{" + ",".join(typing.get_args(hint)) + "}"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) > 1:
            return {"nargs": "+", "metavar": "NAME"}
        return _kind(kinds[0])
    return {"type": hint, "metavar": _METAVARS.get(hint, "PATH")}


def _one_or_several(names: list[str]) -> str | list[str]:
    """Return `names` as `SylvaConfig.scope` takes them.

    A single name with other characters than those of a module's name is "all-linear" or a regular expression; other
    names are endings of module names.
    """
    return names if len(names) > 1 or re.fullmatch(r"[\w.]+", names[0]) else names[0]
