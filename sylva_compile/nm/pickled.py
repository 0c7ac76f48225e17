"""`HoldsCodes`: what holds places of values, and is pickled with its model."""

from typing import Any

from sylva_compile.errors import MaskError


class HoldsCodes:
    """Mixin of classes with an attribute `codes`; pickles of versions that held columns in its place are refused."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled state. Raises MaskError for one without codes."""
        if "codes" not in state:
            raise MaskError(
                "This pickle of pruned weights is of a version that kept columns as numbers; save state_dict() and "
                "NMMasks.save() with that version, and load those."
            )
        self.__dict__.update(state)
