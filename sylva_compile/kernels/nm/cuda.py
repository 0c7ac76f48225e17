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

DEFAULT_ALGORITHM = (0, 1, -1)
"""The algorithm that torch takes by itself, and no splitting of the sum."""

_patterns: dict[tuple[int, torch.Size, torch.dtype, torch.device], bool] = {}
_algorithms: dict[tuple[torch.Size, int, torch.dtype, torch.device], tuple[int, int, int]] = {}


def version() -> int | None:
    """Return the version of cuSPARSELt, such as 800 for 0.8.0; None where torch was built without it."""
    return torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None


def missing(rows: int, in_features: int, per_row: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why cuSPARSELt cannot multiply by a matrix of this shape on this GPU, in one line; None if it can."""
    if 2 * per_row != in_features:
        return "cuSPARSELt needs 2 of every 4 values"
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


def compress(values: Tensor, columns: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Return a 2:4 matrix in cuSPARSELt's format, as the two operands of `sylva::nm_mm`.

    It pays to keep them for a weight that is read more often than it changes. Call it outside of compiled code.

    Args:
        values: `[rows, in_features / 2]`, float16 or bfloat16, on a GPU.
        columns: their columns, two in every group of four.
        in_features: the number of columns of W.

    Returns:
        The compressed matrix, `[rows, ...]`, and columns `[rows, 0]`.

    Raises:
        ArgumentError: the columns are not two in every group of four.
    """
    if not is_two_of_four(columns):
        raise ArgumentError("cuSPARSELt keeps 2 of every 4 values and would drop others; prune with n=2, m=4.")
    return _compressed(values, columns, in_features), columns[:, :0]


def is_two_of_four(columns: Tensor) -> bool:
    """Return whether `columns [rows, p]` are two in every group of four, looked at once for each place in memory.

    It waits for the GPU. While a CUDA graph is captured, which forbids that, columns not seen before count as others.
    """
    key = (columns.data_ptr(), columns.shape, columns.dtype, columns.device)
    if key not in _patterns:
        if torch.cuda.is_current_stream_capturing():
            return False
        _patterns[key] = bool(_in_their_groups(columns).all())
    return _patterns[key]


def _compressed(values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    # Memory that was looked at may hold columns of another pattern by now. NaN shows what would be dropped.
    values = torch.where(_in_their_groups(columns), values, torch.nan)
    with current(values.device):
        compressed: Tensor = _torch.cslt_compress(to_dense(values, columns, in_features))
    return compressed


def _in_their_groups(columns: Tensor) -> Tensor:
    """Return, bool `[rows, 1]`, whether the columns of a row are two in every group of four."""
    group = torch.arange(columns.shape[1], device=columns.device) // 2
    return (torch.div(columns, 4, rounding_mode="floor") == group).all(dim=1, keepdim=True)


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


def packed_and_multiplied(x: Tensor, values: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Return `x · Wᵀ`, compressing W on the way; shapes as in `sylva_compile.kernels.nm_mm`."""
    return compressed_product(x, _compressed(values, columns, in_features))


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
