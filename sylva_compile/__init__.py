"""Fine-tune a few blocks of each weight, chosen by second-order information, at the cost of a frozen model."""

from sylva_compile.adapters.adapters import load_adapter, merge_adapter, save_adapter, unload_adapter
from sylva_compile.blocks.masks import BlockMask, Masks
from sylva_compile.compiler.backend import backend
from sylva_compile.errors import SylvaError
from sylva_compile.optim import AdamW
from sylva_compile.tracing.trace import estimate, trace_and_mask
from sylva_compile.version import __version__

__all__ = [
    "AdamW",
    "BlockMask",
    "Masks",
    "SylvaError",
    "__version__",
    "backend",
    "estimate",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "trace_and_mask",
    "unload_adapter",
]
