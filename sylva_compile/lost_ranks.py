"""`naming_lost_ranks`: errors of messages to a process that has ended say so, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistNetworkError

from sylva_compile.errors import LostRankError

_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError", "was aborted")
"""Words in the errors of Gloo and NCCL, whose classes say no more than that a message failed."""


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
        lost = isinstance(error, DistNetworkError) or any(word in str(error) for word in _LOST)
        if isinstance(error, LostRankError) or not lost:
            raise
        # Gloo's messages go on with advice on bugs.
        reason = next(iter(str(error).splitlines()), "").partition(". ")[0]
        raise LostRankError(f"Another process ended during {work} ({reason}); {advice}.") from error
