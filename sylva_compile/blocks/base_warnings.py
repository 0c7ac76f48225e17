"""Warnings about the base of a weight that was loaded."""

import functools
import logging

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
