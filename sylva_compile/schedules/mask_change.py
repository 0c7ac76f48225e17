"""`MaskChange`: choose the second masks of pruned weights again every few steps."""

from typing import Any

from sylva_compile.errors import ArgumentError
from sylva_compile.nm.masks import NMMasks


class MaskChange:
    """Chooses the second masks (C of SLoPe) again after every so many steps; call `step()` after `optimizer.step()`.

    Nothing is compiled again. `ScheduleCallback(MaskChange(masks))` does it in a Trainer, and saves and resumes it.

    Attributes:
        masks: the masks of the model.
        every: the number of steps from one change to the next.
        steps: the number of steps so far.
    """

    def __init__(self, masks: NMMasks, every: int = 100) -> None:
        """Begin at step 0; the model is pruned now unless it is already.

        Args:
            masks: masks bound to the model.
            every: the number of optimizer steps from one change to the next.

        Raises:
            ArgumentError: `masks` is no NMMasks, or `every` no positive integer.
        """
        if not isinstance(masks, NMMasks):
            raise ArgumentError(f"masks is a {type(masks).__name__}; give the NMMasks that prune_masks returns.")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ArgumentError(f"every={every!r}; use a positive integer.")
        masks.embed()
        self.masks, self.every, self.steps = masks, every, 0

    def step(self) -> None:
        """Follow a step of the optimizer."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.masks.change_masks()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the state dicts of the model and of the optimizer."""
        return {"steps": self.steps, "every": self.every, "masks": self.masks.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was made; load the model's own state dict before.

        Raises:
            ArgumentError: it was made with another `every`.
            MaskError: it is of other weights, or adapters are missing; nothing has changed then.
        """
        if state_dict.get("every") != self.every:
            raise ArgumentError(
                f"The state is of changes every {state_dict.get('every')} steps, and this schedule has {self.every}; "
                "give the same."
            )
        self.masks.load_state_dict(state_dict["masks"])
        self.steps = state_dict["steps"]
