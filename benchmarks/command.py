"""The command-line parser of the benchmarks, which are started as modules: `python -m benchmarks.NAME`."""

import argparse
from importlib.machinery import ModuleSpec


def parser_of(spec: ModuleSpec, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the program name `python -m MODULE`; `--help` keeps the line breaks of `description`."""
    return argparse.ArgumentParser(
        prog=f"python -m {spec.name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
