"""`naming_lost_ranks`: errors of messages to a process that has ended say so, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistBackendError, DistNetworkError

from sylva_compile.errors import LostRankError

_LOST = ("closed by peer", "reset by peer", "Broken pipe")
"""Words in the errors of Gloo, which have no class of their own."""


@contextmanager
def naming_lost_ranks(work: str, advice: str) -> Iterator[None]:
    """Raise LostRankError where a message fails because another process has ended; it is a decorator as well.

    Args:
        work: the name of what is interrupted.
        advice: what to do then.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, DistBackendError | DistNetworkError) or any(word in str(error) for word in _LOST)
        if isinstance(error, LostRankError) or not lost:
            raise
        # Gloo's messages go on with advice on bugs.
        reason = next(iter(str(error).splitlines()), "").partition(". ")[0]
        raise LostRankError(f"Another process ended during {work} ({reason}); {advice}.") from error
