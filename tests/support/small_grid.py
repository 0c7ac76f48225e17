"""A grid of two methods on one task, for tests that need rows and train nothing."""

from collections.abc import Sequence


def grid_of_two(learning_rates: Sequence[float]) -> str:
    """Return the text of a grid with two seeds whose lines choose among `learning_rates`."""
    return f"""
learning_rates = {list(learning_rates)}
choose_by = "loss"
seeds = [0, 1]
[tasks]
sst2 = {{}}
[methods]
"full" = {{ kind = "full" }}
"linear" = {{ kind = "linear" }}
"""
