"""Schedules: which blocks are trained at which step."""

from typing import TYPE_CHECKING, Any

from sylva_compile.schedules.layers import LayerSchedule
from sylva_compile.schedules.moving import MovingBlocks

if TYPE_CHECKING:
    from sylva_compile.schedules.trainer_callback import ScheduleCallback

__all__ = ["LayerSchedule", "MovingBlocks", "ScheduleCallback"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import.
    if name == "ScheduleCallback":
        from sylva_compile.schedules.trainer_callback import ScheduleCallback

        return ScheduleCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
