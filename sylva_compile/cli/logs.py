"""The log of a command: lines on stderr; and whether bars may be drawn."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Plain(logging.Formatter):
    """Messages as they are; warnings and errors with their level before them."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def logging_to_stderr(verbose: int) -> Iterator[None]:
    """Write the log of the package to stderr meanwhile.

    Warnings and the command's own lines are shown; with `verbose` 1 what the package tells, with 2 everything.
    """
    package, own = logging.getLogger("sylva_compile"), logging.getLogger("sylva_compile.cli")
    before = (package.level, own.level, package.propagate)
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    package.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    own.setLevel(min(logging.INFO if is_first_rank() else logging.WARNING, package.level))
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        own.setLevel(before[1])


def is_first_rank() -> bool:
    """Whether this process is the only one or the first of a distributed training, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def shows_bars() -> bool:
    """Whether progress bars are drawn: on a terminal, and by one process."""
    return is_first_rank() and sys.stderr.isatty()
