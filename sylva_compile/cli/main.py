"""`main`: the table of subcommands, parsing, logging, and exit codes.

Exit codes: 0 all went well; 1 an error; 2 wrong usage; 130 interrupted. Errors are one line on stderr.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from sylva_compile.cli.arguments import add_fields, make
from sylva_compile.cli.config_file import read_config_file
from sylva_compile.cli.logs import hide_bars, logging_to_stderr
from sylva_compile.cli.options import (
    AdapterConfig,
    DataConfig,
    ExportConfig,
    FinetuneConfig,
    InspectConfig,
    ModelConfig,
    ReportConfig,
    TraceConfig,
)
from sylva_compile.cli.signals import INTERRUPTED, terminating_as_interrupted
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import ArgumentError, SylvaError
from sylva_compile.version import __version__


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        help: what it does.
        usage: its usual arguments.
        module: its module, with a function `run` that takes the options and returns the exit code.
        options: dataclasses of its options, by the titles of their groups.
    """

    help: str
    usage: str
    module: str
    options: dict[str, type]


COMMANDS = {
    "finetune": Command(
        "train the blocks of a causal language model and write an adapter",
        "--model MODEL --data DATA [options]",
        "finetune",
        {
            "model": ModelConfig,
            "data": DataConfig,
            "training": FinetuneConfig,
            "blocks, and the trace that chooses them": SylvaConfig,
        },
    ),
    "trace": Command(
        "choose the blocks of a model and write them to a file",
        "--model MODEL --data DATA [options]",
        "trace",
        {
            "model": ModelConfig,
            "data": DataConfig,
            "result": TraceConfig,
            "blocks, and the trace that chooses them": SylvaConfig,
        },
    ),
    "inspect": Command(
        "show what an adapter or a file of masks holds", "PATH [--json]", "inspect", {"what to show": InspectConfig}
    ),
    "report": Command(
        "write a page about where training changed the model",
        "--model MODEL --adapter PATH [options]",
        "report",
        {"what to show": ReportConfig},
    ),
    "merge": Command(
        "write a base with an adapter in it as an ordinary checkpoint",
        "--model MODEL --adapter PATH --out PATH",
        "merge",
        {"base and adapter": AdapterConfig},
    ),
    "export": Command(
        "write an adapter in a format that other programs read",
        "--model MODEL --adapter PATH --out PATH [options]",
        "export",
        {"base and adapter": AdapterConfig, "format": ExportConfig},
    ),
}

_OMIT = ("progress",)
"""Progress bars are shown on a terminal and nowhere else."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with the arguments `argv`, or those of the command line, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        name, found, options = _parse(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    except SylvaError as error:
        return _fail(error)
    with logging_to_stderr(found.verbose), terminating_as_interrupted():
        try:
            hide_bars()
            command = importlib.import_module(f"sylva_compile.cli.{COMMANDS[name].module}")
            return int(command.run(*options))
        except KeyboardInterrupt:
            print("error: interrupted before the command was done.", file=sys.stderr)
            return INTERRUPTED
        except (SylvaError, OSError, MemoryError) as error:
            return _fail(error)
        except RuntimeError as error:
            # torch's class, which cannot be named before torch is imported.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            return _fail(error)


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, and those of the subcommands by name."""
    parser = _Parser(
        prog="sylva-compile",
        description="Fine-tune a few blocks of each weight of a language model, inside the frozen model.",
        epilog="`sylva-compile COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    found = {}
    for name, command in COMMANDS.items():
        each = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            usage=f"sylva-compile {name} {command.usage}",
            allow_abbrev=False,
        )
        each.add_argument("--config", type=Path, metavar="FILE", help="YAML file of options; those given here win")
        each.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv says everything")
        for title, options in command.options.items():
            add_fields(each, title, options, _OMIT)
        found[name] = each
    return parser, found


def _parse(arguments: list[str]) -> tuple[str, argparse.Namespace, list[object]]:
    """Return the subcommand's name, all values, and its options."""
    parser, commands = build_parser()
    if arguments and arguments[0] in commands:
        name, given = arguments[0], arguments[1:]
        offered = {action.dest for action in commands[name]._actions if action.option_strings}
        known = offered - {"help", "config", "verbose"}
        if path := _config_path(given):
            arguments = [name, *read_config_file(path, known), *given]
    found = parser.parse_args(arguments)
    return found.command, found, [make(options, found) for options in COMMANDS[found.command].options.values()]


def _config_path(given: list[str]) -> Path | None:
    """Return the value of `--config`, which is read before the other arguments."""
    early = _Parser(add_help=False, allow_abbrev=False, prog="sylva-compile")
    early.add_argument("--config", type=Path)
    path: Path | None = early.parse_known_args(given)[0].config
    return path


def _fail(error: BaseException) -> int:
    """Print `error` on one line and return the exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if isinstance(error, ArgumentError) else 1
