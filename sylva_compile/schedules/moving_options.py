"""The options of `MovingBlocks`, and their checks."""

from typing import Literal, get_args

from sylva_compile.errors import ArgumentError

Choose = Literal["random", "cycle", "gradient", "sketch", "gain", "greedy"]
Rounding = Literal["nearest", "stochastic"]


def check_options(every: int, choose: str, temperature: float, column_budget: float | None, rounding: str) -> None:
    """Raise ArgumentError if an option is out of its range."""
    if every < 1 or int(every) != every:
        raise ArgumentError(f"every={every}; give a whole number of steps from 1 on.")
    if choose not in get_args(Choose):
        raise ArgumentError(f"choose={choose!r}; use {', '.join(map(repr, get_args(Choose)))}.")
    if not temperature >= 0:
        raise ArgumentError(f"temperature={temperature}; give 0 or more.")
    if column_budget is not None and not 0 < column_budget <= 1:
        raise ArgumentError(f"column_budget={column_budget}; give a share above 0, up to 1, or None.")
    if column_budget is not None and choose == "cycle":
        raise ArgumentError("choose='cycle' visits all columns in turn; leave out column_budget, or use 'random'.")
    if rounding not in get_args(Rounding):
        raise ArgumentError(f"rounding={rounding!r}; use 'nearest' or 'stochastic'.")
