"""The kernel that each N:M matrix was last multiplied by, for reports.

Process-wide state: at most `_MOST` entries, forgotten all at once. A matrix is known by where its columns are in
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


def note_choice(columns: Tensor, transposed: bool, kernel: str, tokens: int) -> None:
    """Note that the matrix with `columns [rows, p]` is multiplied by `kernel` now."""
    if len(_last) >= _MOST:
        _last.clear()
    _last[_key(columns, transposed)] = Ran(kernel, tokens)


def last_choice(columns: Tensor, transposed: bool = False) -> Ran | None:
    """Return the last product of the matrix with `columns [rows, p]` in this process, or None if there was none."""
    return _last.get(_key(columns, transposed))


def forget_choices(columns: Tensor) -> None:
    """Forget the products of a matrix that had the memory of `columns [rows, p]`, which are those of a new matrix."""
    for transposed in (False, True):
        _last.pop(_key(columns, transposed), None)


def _key(columns: Tensor, transposed: bool) -> tuple[int, int, int, bool]:
    return columns.data_ptr(), columns.shape[0], columns.shape[1], transposed
