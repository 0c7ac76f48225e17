import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from sylva_compile.cli.arguments import add_fields, make
from sylva_compile.config import SylvaConfig


@dataclass(frozen=True)
class Options:
    name: str = field(metadata={"help": "a name", "positional": True})
    share: float = field(metadata={"help": "a share of 5%"})
    size: int | None = field(default=None, metadata={"help": "a size"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "a kind"})
    fast: bool = field(default=False, metadata={"help": "a flag"})
    path: Path = field(default=Path("x"), metadata={"help": "a path", "metavar": "FILE"})


def parse(options: type, *arguments: str, omit: tuple[str, ...] = ()) -> object:
    parser = argparse.ArgumentParser()
    add_fields(parser, "options", options, omit)
    return make(options, parser.parse_args(arguments))


def test_every_kind_of_field() -> None:
    assert parse(Options, "n", "--share", "0.5") == Options("n", 0.5)
    given = ["n", "--share", "1e-2", "--size", "3", "--kind", "b", "--fast", "--path", "y/z"]
    assert parse(Options, *given) == Options("n", 0.01, 3, "b", True, Path("y/z"))
    assert parse(Options, *given, "--no-fast", "--size=4") == Options("n", 0.01, 4, "b", False, Path("y/z"))


def test_a_field_without_default_is_required() -> None:
    with pytest.raises(SystemExit):
        parse(Options, "n")


def test_the_help_names_types_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_fields(parser, "options", Options)
    text = parser.format_help()
    for part in ("--share X", "a share of 5%", "--size N", "--kind {a,b}", "a kind (a)", "--path FILE", "a path (x)"):
        assert part in text
    assert "a flag (" not in text


@pytest.mark.parametrize(
    ("names", "scope"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "mlp.up_proj"], ("q_proj", "mlp.up_proj")),
        ([r".*_proj"], r".*_proj"),
    ],
)
def test_the_settings_of_a_trace(names: list[str], scope: str | tuple[str, ...]) -> None:
    assert parse(SylvaConfig) == SylvaConfig()
    found = parse(SylvaConfig, "--scope", *names, "--damping", "0.5", "--method", "kfac", omit=("progress",))
    assert found == SylvaConfig(scope=scope, damping=0.5, method="kfac")


def test_every_setting_is_offered_with_its_help() -> None:
    parser = argparse.ArgumentParser()
    add_fields(parser, "blocks", SylvaConfig)
    text = " ".join(parser.format_help().split())
    for one in fields(SylvaConfig):
        assert f"--{one.name.replace('_', '-')}" in text
    assert " ".join(SylvaConfig.__dataclass_fields__["sparsity"].metadata["help"].split()) in text
