import logging
import os
import signal

import pytest

from sylva_compile.cli.logs import is_first_rank, logging_to_stderr, shows_bars
from sylva_compile.cli.signals import StopAsked, terminating_as_interrupted

PACKAGE, OWN = logging.getLogger("sylva_compile.tracing"), logging.getLogger("sylva_compile.cli.training")


@pytest.mark.parametrize(
    ("verbose", "shown"),
    [(0, "own\nwarning: odd\n"), (1, "told\nown\nwarning: odd\n"), (2, "detail\ntold\nown\nwarning: odd\n")],
)
def test_what_is_logged(verbose: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr(verbose):
        PACKAGE.debug("detail")
        PACKAGE.info("told")
        OWN.info("own")
        PACKAGE.warning("odd")
    assert capsys.readouterr().err == shown
    OWN.info("later")
    assert not capsys.readouterr().err


def test_the_first_rank_speaks_and_draws(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert is_first_rank() and shows_bars()
    monkeypatch.setenv("RANK", "1")
    assert not is_first_rank() and not shows_bars()
    with logging_to_stderr(0):
        OWN.info("own")
    assert not capsys.readouterr().err


def test_torch_logs_is_not_doubled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCH_LOGS", "+sylva_compile")
    with logging_to_stderr(0):
        OWN.info("own")
    assert not capsys.readouterr().err


def test_sigterm_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminating_as_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_signal_is_noted_and_the_second_interrupts() -> None:
    asked = StopAsked()
    with asked.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.noted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
