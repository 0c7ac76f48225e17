"""The options of `MovingBlocks` and the settings of its states, and their checks."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sylva_compile.errors import ArgumentError

Choose = Literal["random", "cycle", "gradient", "sketch", "gain", "greedy"]
Rounding = Literal["nearest", "stochastic"]

FORMAT = "sylva-moving-blocks-1"


def check_options(
    masks: object,
    every: object,
    choose: str,
    temperature: object,
    column_budget: float | None,
    carry: str,
    rounding: str,
) -> None:
    """Raise ArgumentError if an option is out of its range."""
    # Only here: the command line names the options before it imports torch.
    from sylva_compile.blocks.masks import Masks
    from sylva_compile.blocks.moving import Carry

    if not isinstance(masks, Masks):
        raise ArgumentError(f"masks is a {type(masks).__name__}; give the Masks that trace_and_mask returns.")
    if not isinstance(every, int | float) or not 1 <= every < math.inf or int(every) != every:
        raise ArgumentError(f"every={every}; give a whole number of steps from 1 on.")
    if choose not in get_args(Choose):
        raise ArgumentError(f"choose={choose!r}; use {', '.join(map(repr, get_args(Choose)))}.")
    if not isinstance(temperature, int | float) or not temperature >= 0:
        raise ArgumentError(f"temperature={temperature}; give 0 or more.")
    if column_budget is not None and not 0 < column_budget <= 1:
        raise ArgumentError(f"column_budget={column_budget}; give a share above 0, up to 1, or None.")
    if column_budget is not None and choose == "cycle":
        raise ArgumentError("choose='cycle' visits all columns in turn; leave out column_budget, or use 'random'.")
    if carry not in get_args(Carry):
        raise ArgumentError(f"carry={carry!r}; use {' or '.join(map(repr, get_args(Carry)))}.")
    if rounding not in get_args(Rounding):
        raise ArgumentError(f"rounding={rounding!r}; use 'nearest' or 'stochastic'.")


def check_state(state_dict: object, settings: Mapping[str, Any]) -> None:
    """Raise ArgumentError unless `state_dict` is of a schedule with these `settings`."""
    if not isinstance(state_dict, Mapping) or state_dict.get("format") != FORMAT:
        raise ArgumentError("This is no state of MovingBlocks; give what its state_dict() returned.")
    if state_dict["settings"] != settings:
        raise ArgumentError(
            f"The state is of a schedule with {state_dict['settings']}, and this one has {settings}; make it with the "
            "same settings."
        )
