"""Warnings about the base of a weight that was loaded, and the error for a weight that another module takes."""

import functools
import logging

from sylva_compile.errors import EmbedError

log = logging.getLogger(__name__)


@functools.cache
def warn_of_another_base() -> None:
    """Warn once a process: a model has hundreds of weights."""
    log.warning(
        "The loaded weights differ from the base outside of the blocks too and are the base from now on. If they come "
        "from a training with other masks, load those masks first; if its blocks moved, load the schedule's state next."
    )


@functools.cache
def warn_of_whole(name: str) -> None:
    """Warn once a weight."""
    log.warning(
        "Blocks of %s have been everywhere, so a loaded weight is taken for one of this training and its base stays; "
        "to load another base, call unload_adapter(model) first.",
        name,
    )


def not_shareable(name: str, place: str) -> EmbedError:
    """Return the error for the dense weight `name` that another module takes as parameter, which `place` names."""
    return EmbedError(
        f"{name} carries blocks and cannot become {place}; convert the model (to float8, say) or tie its weights "
        "before its masks are embedded, or unload the adapter first."
    )
