"""The kernel that each N:M matrix was last multiplied by, for reports.

Process-wide state: at most `_MOST` entries, forgotten all at once. A matrix is known by where its codes are in
memory, and by its shape: one that takes the memory of another of its shape is taken for it until it is multiplied.
"""

from typing import NamedTuple

from torch import Tensor

_MOST = 1 << 14
_last: "dict[tuple[int, int, int, bool], Ran]" = {}


class Ran(NamedTuple):
    """A product that ran: the name of its kernel, and how many tokens it had."""

    kernel: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.kernel} at {self.tokens} tokens"


def note_choice(codes: Tensor, transposed: bool, kernel: str, tokens: int) -> None:
    """Note that the matrix with `codes [rows, bytes]` is multiplied by `kernel` now."""
    if len(_last) >= _MOST:
        _last.clear()
    _last[_key(codes, transposed)] = Ran(kernel, tokens)


def last_choice(codes: Tensor, transposed: bool = False) -> Ran | None:
    """Return the last product of the matrix with `codes [rows, bytes]` in this process, or None if there was none."""
    return _last.get(_key(codes, transposed))


def forget_choices(codes: Tensor) -> None:
    """Forget the products of a matrix that had the memory of `codes [rows, bytes]`, which are those of a new matrix."""
    for transposed in (False, True):
        _last.pop(_key(codes, transposed), None)


def _key(codes: Tensor, transposed: bool) -> tuple[int, int, int, bool]:
    return codes.data_ptr(), codes.shape[0], codes.shape[1], transposed
