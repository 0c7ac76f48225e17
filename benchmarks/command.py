"""The command-line parser of a benchmark, which is started as a module."""

import argparse
from importlib.machinery import ModuleSpec


def parser_of(spec: ModuleSpec, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m` with the module of `spec`; `--help` keeps the line breaks of `description`."""
    return argparse.ArgumentParser(
        prog=f"python -m {spec.name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
