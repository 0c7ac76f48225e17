"""2:4 products on NVIDIA GPUs by cuSPARSELt, through torch's private operations.

cuSPARSELt multiplies a matrix in a format of its own, which `compress` makes: half of the values and their places,
9/16 of the dense matrix. torch's other 2:4 kernel, of CUTLASS, runs on compute capability 8.x alone and is not used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sylva_compile import _torch
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.devices import current
from sylva_compile.kernels.nm_mm import to_dense

_DTYPES = (torch.float16, torch.bfloat16)
_WEIGHT_STEP, _TOKEN_STEP = 16, 8
_CAPABILITY = (8, 0)
_PATTERNS = ((2, 4), (1, 2))
"""Patterns that keep at most 2 of every 4 values."""

DEFAULT_ALGORITHM = (0, 1, -1)
"""The algorithm that torch takes by itself, and no splitting of the sum."""

_algorithms: dict[tuple[torch.Size, int, torch.dtype, torch.device], tuple[int, int, int]] = {}


def version() -> int | None:
    """Return the version of cuSPARSELt, such as 800 for 0.8.0; None where torch was built without it."""
    return torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None


def missing(rows: int, in_features: int, n: int, m: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why cuSPARSELt cannot multiply by a matrix of this shape on this GPU, in one line; None if it can."""
    if (n, m) not in _PATTERNS:
        return f"cuSPARSELt needs 2 of every 4 values, not {n} of {m}"
    if dtype not in _DTYPES:
        return f"cuSPARSELt needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if rows % _WEIGHT_STEP or in_features % _WEIGHT_STEP or 0 in (rows, in_features):
        return f"cuSPARSELt needs a weight whose sizes are multiples of {_WEIGHT_STEP}, not {rows} x {in_features}"
    if not torch.backends.cusparselt.is_available():
        return "torch was built without cuSPARSELt"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"cuSPARSELt needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def compress(values: Tensor, codes: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return a 2:4 matrix in cuSPARSELt's format, as the two operands of `sylva::nm_mm`.

    It pays to keep them for a weight that is read more often than it changes. Call it outside of compiled code.

    Args:
        values: `[rows, in_features / 2]`, float16 or bfloat16, on a GPU.
        codes: their codes (`sylva_compile.kernels.nm_codes`).
        n: 2, or 1.
        m: 4, or 2.

    Returns:
        The compressed matrix, `[rows, ...]`, and codes `[rows, 0]`.

    Raises:
        ArgumentError: the pattern is not 2:4 or 1:2.
    """
    if (n, m) not in _PATTERNS:
        raise ArgumentError(
            f"cuSPARSELt keeps 2 of every 4 values and would drop some of {n}:{m}; prune with n=2, m=4."
        )
    return _compressed(values, codes, n, m), codes[:, :0]


def _compressed(values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    with current(values.device):
        compressed: Tensor = _torch.cslt_compress(to_dense(values, codes, n, m))
    return compressed


def compressed_product(x: Tensor, compressed: Tensor) -> Tensor:
    """Return `x · Wᵀ`, `[tokens, rows]`, for `x [tokens, in_features]` and a matrix that `compress` has returned."""
    tokens = x.shape[0]
    if tokens == 0:
        return x.new_empty((0, compressed.shape[0]))
    padded = F.pad(x, (0, 0, 0, -tokens % _TOKEN_STEP)).contiguous()
    # The private names are looked up here, so that the CPU's kernels do without them.
    with current(x.device):
        product: Tensor = _torch.cslt_sparse_mm(
            compressed, padded.t(), None, None, None, True, *_algorithm(compressed, padded)
        )
    return product[:tokens]


def packed_and_multiplied(x: Tensor, values: Tensor, codes: Tensor, n: int, m: int) -> Tensor:
    """Return `x · Wᵀ`, compressing W on the way; shapes as in `sylva_compile.kernels.nm_mm`."""
    return compressed_product(x, _compressed(values, codes, n, m))


def _algorithm(compressed: Tensor, x: Tensor) -> tuple[int, int, int]:
    """Return cuSPARSELt's algorithm and its two options, searched for once for tokens up to a power of two.

    A search takes long, and the numbers of tokens of a training or of a generation are many.
    """
    key = (compressed.shape, max(x.shape[0] - 1, 0).bit_length(), x.dtype, x.device)
    if key not in _algorithms:
        if torch.cuda.is_current_stream_capturing():
            # A search waits for the GPU, which a capture forbids.
            return DEFAULT_ALGORITHM
        _algorithms[key] = _torch.search_sparse_mm(compressed, x.t())
    return _algorithms[key]
