"""Fine-tune a few blocks of each weight, chosen by second-order information, at the cost of a frozen model.

Public names load their modules when they are first used, so that importing the package costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sylva_compile.version import __version__

if TYPE_CHECKING:
    from sylva_compile import errors, integrations, optim, reports, schedules
    from sylva_compile.adapters.changes import changed_values
    from sylva_compile.adapters.disabling import disable_adapter
    from sylva_compile.adapters.export_shira import export_peft
    from sylva_compile.adapters.hub import from_pretrained, push_to_hub
    from sylva_compile.adapters.loading import load_adapter, merge_and_unload, unload_adapter
    from sylva_compile.adapters.reference import reference_model
    from sylva_compile.adapters.saving import save_adapter
    from sylva_compile.adapters.switching import active_adapter, delete_adapter, list_adapters, set_adapter
    from sylva_compile.blocks.block_mask import BlockMask
    from sylva_compile.blocks.masks import Masks
    from sylva_compile.blocks.parameters import print_trainable_parameters
    from sylva_compile.compiler.backend import backend
    from sylva_compile.compiler.layers import compile_layers
    from sylva_compile.config import SylvaConfig
    from sylva_compile.errors import SylvaError
    from sylva_compile.integrations.distributed_checkpoint import blocks_state
    from sylva_compile.nm.adapters import add_low_rank, fold_low_rank
    from sylva_compile.nm.export import export_pruned, unprune
    from sylva_compile.nm.masks import NMMasks
    from sylva_compile.nm.prune import prune_masks
    from sylva_compile.optim.optimizers import AdamW
    from sylva_compile.tracing.trace import estimate, trace_and_mask

__all__ = [
    "AdamW",
    "BlockMask",
    "Masks",
    "NMMasks",
    "SylvaConfig",
    "SylvaError",
    "__version__",
    "active_adapter",
    "add_low_rank",
    "backend",
    "blocks_state",
    "changed_values",
    "compile_layers",
    "delete_adapter",
    "disable_adapter",
    "errors",
    "estimate",
    "export_peft",
    "export_pruned",
    "fold_low_rank",
    "from_pretrained",
    "integrations",
    "list_adapters",
    "load_adapter",
    "merge_and_unload",
    "optim",
    "print_trainable_parameters",
    "prune_masks",
    "push_to_hub",
    "reference_model",
    "reports",
    "save_adapter",
    "schedules",
    "set_adapter",
    "trace_and_mask",
    "unload_adapter",
    "unprune",
]

_MODULES = {
    "AdamW": "optim.optimizers",
    "BlockMask": "blocks.block_mask",
    "Masks": "blocks.masks",
    "NMMasks": "nm.masks",
    "SylvaConfig": "config",
    "SylvaError": "errors",
    "active_adapter": "adapters.switching",
    "add_low_rank": "nm.adapters",
    "backend": "compiler.backend",
    "blocks_state": "integrations.distributed_checkpoint",
    "changed_values": "adapters.changes",
    "compile_layers": "compiler.layers",
    "delete_adapter": "adapters.switching",
    "disable_adapter": "adapters.disabling",
    "estimate": "tracing.trace",
    "export_peft": "adapters.export_shira",
    "export_pruned": "nm.export",
    "fold_low_rank": "nm.adapters",
    "from_pretrained": "adapters.hub",
    "list_adapters": "adapters.switching",
    "load_adapter": "adapters.loading",
    "merge_and_unload": "adapters.loading",
    "print_trainable_parameters": "blocks.parameters",
    "prune_masks": "nm.prune",
    "push_to_hub": "adapters.hub",
    "reference_model": "adapters.reference",
    "save_adapter": "adapters.saving",
    "set_adapter": "adapters.switching",
    "trace_and_mask": "tracing.trace",
    "unload_adapter": "adapters.loading",
    "unprune": "nm.export",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "integrations", "optim", "reports", "schedules"):
        return importlib.import_module(f"sylva_compile.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sylva_compile.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
