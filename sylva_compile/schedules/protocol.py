"""`Schedule`: the methods of a schedule that loops, callbacks and checkpoints call."""

from typing import Any, Protocol


class Schedule(Protocol):
    """A schedule that a callback can run: `MovingBlocks` or `LayerSchedule`."""

    def step(self) -> None:
        """Follow a step of the optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on where `state_dict` was made."""
