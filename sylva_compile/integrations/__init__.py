"""Integrations: checkpoints of transformers' Trainer, TRL's trainers and accelerate that hold blocks.

Names load their modules when they are first used: transformers takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sylva_compile.integrations.accelerate import BlocksState, register_blocks_for_checkpointing
    from sylva_compile.integrations.low_rank_callback import LowRankCallback
    from sylva_compile.integrations.trainer import BlocksTrainerMixin
    from sylva_compile.integrations.trainer_callback import BlocksCallback

__all__ = [
    "BlocksCallback",
    "BlocksState",
    "BlocksTrainerMixin",
    "LowRankCallback",
    "register_blocks_for_checkpointing",
]

_MODULES = {
    "BlocksCallback": "trainer_callback",
    "BlocksState": "accelerate",
    "BlocksTrainerMixin": "trainer",
    "LowRankCallback": "low_rank_callback",
    "register_blocks_for_checkpointing": "accelerate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sylva_compile.integrations.{_MODULES[name]}"), name)
