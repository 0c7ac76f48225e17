"""The states of schedules in a checkpoint that holds an adapter, which has the values and places of all blocks."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import ArgumentError
from sylva_compile.schedules.moving import MovingBlocks
from sylva_compile.schedules.protocol import Schedule


def masks_that_move(schedules: Iterable[Schedule], model: nn.Module | None = None) -> Masks | None:
    """Return the masks whose blocks one of `schedules` moves, if any: such a schedule has them as `masks`.

    With a model, only its own masks count: schedules may be of several models.
    """
    found = (getattr(schedule, "masks", None) for schedule in schedules)
    every = (masks for masks in found if isinstance(masks, Masks))
    return next((masks for masks in every if model is None or masks.model is unwrap(model)), None)


def state_beside_adapter(schedule: Schedule) -> dict[str, Any]:
    """Return the state of `schedule` without what an adapter of the same step holds."""
    return schedule.draws() if isinstance(schedule, MovingBlocks) else schedule.state_dict()


def load_state_beside_adapter(schedule: Schedule, state: Mapping[str, Any]) -> None:
    """Load what `state_beside_adapter` returned into `schedule`, whose model has the adapter of that step.

    Raises:
        ArgumentError: the state is of another schedule; nothing is changed then.
    """
    state = dict(state)
    if isinstance(schedule, MovingBlocks):
        now, then = schedule.state_dict()["weights"], state.get("weights", {})
        if now.keys() != then.keys():
            raise ArgumentError("The checkpoint has the state of another schedule, not of MovingBlocks; give the same.")
        state["weights"] = {name: entry | then[name] for name, entry in now.items()}
    schedule.load_state_dict(state)


class StateBesideAdapter:
    """A schedule as an object with `state_dict` and `load_state_dict`, for checkpoints that hold an adapter."""

    def __init__(self, schedule: Schedule) -> None:
        """Take a schedule of the model whose adapter is in the checkpoint."""
        self.schedule = schedule

    def state_dict(self) -> dict[str, Any]:
        """See `state_beside_adapter`."""
        return state_beside_adapter(self.schedule)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `load_state_beside_adapter`."""
        load_state_beside_adapter(self.schedule, state_dict)
