"""Schedules: which blocks are trained at which step.

Names load their modules when they are first used: torch and transformers take seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sylva_compile.schedules.layers import LayerSchedule
    from sylva_compile.schedules.mask_change import MaskChange
    from sylva_compile.schedules.moving import MovingBlocks
    from sylva_compile.schedules.trainer_callback import ScheduleCallback

__all__ = ["LayerSchedule", "MaskChange", "MovingBlocks", "ScheduleCallback"]

_MODULES = {
    "LayerSchedule": "layers",
    "MaskChange": "mask_change",
    "MovingBlocks": "moving",
    "ScheduleCallback": "trainer_callback",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sylva_compile.schedules.{_MODULES[name]}"), name)
