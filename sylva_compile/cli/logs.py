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
    before = (package.level, own.level)
    wanted = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    # TORCH_LOGS=+sylva_compile sets a level, and adds a handler of torch's, when torch is imported.
    package.setLevel(min(wanted, package.level or wanted))
    own.setLevel(min(logging.INFO if is_first_rank() else logging.WARNING, package.level))
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    if "sylva_compile" not in os.environ.get("TORCH_LOGS", ""):
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


def hide_bars() -> None:
    """Let no library draw a bar where none is wanted. It works before tqdm is imported, which reads the variable."""
    if not shows_bars() and "tqdm" not in sys.modules:
        os.environ.setdefault("TQDM_DISABLE", "1")


def shows_bars() -> bool:
    """Whether progress bars are drawn: on a terminal, and by one process."""
    return is_first_rank() and sys.stderr.isatty()
