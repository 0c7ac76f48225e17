"""Signals: Ctrl-C and SIGTERM end a command in order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""The exit code of a command that a signal has ended."""


@contextmanager
def terminating_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt meanwhile, as Ctrl-C does."""
    with _handled((signal.SIGTERM,), signal.default_int_handler):
        yield


class StopAsked:
    """Notes the first signal, so that a step can end; a second one raises KeyboardInterrupt at once.

    Attributes:
        noted: whether a signal has come.
    """

    def __init__(self) -> None:
        self.noted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals meanwhile."""
        with _handled(SIGNALS, self._note):
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    # Python takes handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
