"""The command line of a benchmark, which is started as a module."""

import argparse
from importlib.machinery import ModuleSpec


def parser_of(spec: ModuleSpec, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m` with the module of `spec`; `description` is shown in the lines in which it stands."""
    return argparse.ArgumentParser(
        prog=f"python -m {spec.name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
