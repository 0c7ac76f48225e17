"""The compiled code of N:M sparse matrices on the CPU: what multiplies, and what moves values between places."""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.build.native import load

log = logging.getLogger(__name__)

PRODUCTS_PER_THREAD, MOVES_PER_THREAD = 1 << 20, 1 << 16
"""Products of two elements, and elements that are moved, that are worth waking up a thread."""

_PARTS = {"nm_mm.cpp": ("codes.cpp", "vectors.cpp"), "places.cpp": ("codes.cpp",)}
"""Sources that are compiled into a library before its own."""

_SIZE, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


@functools.cache
def products() -> ctypes.CDLL | None:
    """Return the library of `nm_mm.cpp`; log a warning and return None where it cannot be compiled."""
    library = _load("nm_mm.cpp")
    if library is not None:
        library.sylva_nm_mm.argtypes = [
            *(_INT, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE),
            *(_POINTER, _POINTER, _INT, _INT, _SIZE, _SIZE),
            *(_INT, _POINTER),
        ]
        library.sylva_nm_mm.restype = _INT
    return library


@functools.cache
def places() -> ctypes.CDLL | None:
    """Return the library of `places.cpp`; log a warning and return None where it cannot be compiled."""
    library = _load("places.cpp")
    if library is not None:
        moves: list[Any] = [_INT, _INT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _INT, _POINTER]
        library.sylva_nm_dense.argtypes = library.sylva_nm_gather.argtypes = moves
        library.sylva_nm_transpose.argtypes = [
            *(_INT, _INT, _INT, _POINTER, _POINTER, _POINTER),
            *(_SIZE, _SIZE, _SIZE, _SIZE),
            *(_INT, _POINTER),
        ]
        for function in (library.sylva_nm_dense, library.sylva_nm_gather, library.sylva_nm_transpose):
            function.restype = _INT
    return library


def source(name: str) -> str:
    """Return the source of a library, with the parts that it begins with."""
    return "".join(Path(__file__).with_name(part).read_text() for part in (*_PARTS[name], name))


def threads_for_products(count: int) -> int:
    """Return how many threads multiply so many pairs of elements."""
    return max(1, min(torch.get_num_threads(), count // PRODUCTS_PER_THREAD))


def threads_for_moves(count: int) -> int:
    """Return how many threads move so many elements."""
    return max(1, min(torch.get_num_threads(), count // MOVES_PER_THREAD))


def check(failed: int, m: int) -> None:
    """Raise the error that a function of a library has returned, for groups of m places."""
    if failed == 1:
        raise IndexError(f"A place of the N:M matrix lies outside of the {m} of its group.")
    if failed:
        raise MemoryError("No memory for a panel of an N:M sparse matrix.")


def _load(name: str) -> ctypes.CDLL | None:
    try:
        return load(source(name), name=f"N:M sparsity ({name})")
    except NativeCompilerError as error:
        log.warning("N:M sparsity runs without compiled %s: correct, but slower. %s", name, error)
        return None
