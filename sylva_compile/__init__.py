"""Fine-tune a few blocks of each weight, chosen by second-order information, at the cost of a frozen model.

Public names load their modules when they are first used, so that importing the package costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sylva_compile.version import __version__

if TYPE_CHECKING:
    from sylva_compile import errors, integrations, optim, schedules
    from sylva_compile.adapters.export_shira import export_peft
    from sylva_compile.adapters.loading import load_adapter, merge_and_unload, unload_adapter
    from sylva_compile.adapters.saving import save_adapter
    from sylva_compile.blocks.block_mask import BlockMask
    from sylva_compile.blocks.masks import Masks
    from sylva_compile.blocks.parameters import print_trainable_parameters
    from sylva_compile.compiler.backend import backend
    from sylva_compile.compiler.layers import compile_layers
    from sylva_compile.config import SylvaConfig
    from sylva_compile.errors import SylvaError
    from sylva_compile.optim.optimizers import AdamW
    from sylva_compile.tracing.trace import estimate, trace_and_mask

__all__ = [
    "AdamW",
    "BlockMask",
    "Masks",
    "SylvaConfig",
    "SylvaError",
    "__version__",
    "backend",
    "compile_layers",
    "errors",
    "estimate",
    "export_peft",
    "integrations",
    "load_adapter",
    "merge_and_unload",
    "optim",
    "print_trainable_parameters",
    "save_adapter",
    "schedules",
    "trace_and_mask",
    "unload_adapter",
]

_MODULES = {
    "AdamW": "optim.optimizers",
    "BlockMask": "blocks.block_mask",
    "Masks": "blocks.masks",
    "SylvaConfig": "config",
    "SylvaError": "errors",
    "backend": "compiler.backend",
    "compile_layers": "compiler.layers",
    "estimate": "tracing.trace",
    "export_peft": "adapters.export_shira",
    "load_adapter": "adapters.loading",
    "merge_and_unload": "adapters.loading",
    "print_trainable_parameters": "blocks.parameters",
    "save_adapter": "adapters.saving",
    "trace_and_mask": "tracing.trace",
    "unload_adapter": "adapters.loading",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "integrations", "optim", "schedules"):
        return importlib.import_module(f"sylva_compile.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sylva_compile.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
