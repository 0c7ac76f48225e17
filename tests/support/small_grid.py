"""Small grids of two methods, and rows of them that nobody has trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.grid import Run


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


def grid_file(folder: Path, **changes: str) -> Path:
    """Write a grid of two methods on two tasks to `tiny.toml`, with `changes` of its entries, and return its path."""
    said = {
        "learning_rates": "[1e-3, 1e-2]",
        "seeds": "[0, 1]",
        "settings": '{ model = "tiny", train = 64, validation = 32, extra_test = 8, epochs = 1, block_size = 8 }',
        "tasks": "{ sst2 = {}, cola = { train = 48 } }",
        "methods": '{ head = { kind = "head" }, random = { kind = "blocks", trace = "random" } }',
    } | changes
    path = folder / "tiny.toml"
    path.write_text("".join(f"{name} = {value}\n" for name, value in said.items()))
    return path


def fake_result(run: Run) -> dict[str, Any]:
    """Return the result of a row that says which learning rates are good."""
    # The larger learning rate is better for the method "head", the smaller one for the others.
    good = (run.learning_rate > 5e-3) == (run.method == "head")
    part = {"metric": 0.9 if good else 0.8, "loss": 0.1 + run.seed}
    # The row is like old ones, from before peaks and steps beside the floor were measured.
    numbers = dict.fromkeys(
        ("trainable", "step_ms", "saved_bytes", "state_bytes", "checkpoint_bytes", "trace_seconds"), 1.0
    )
    return {"validation": part, "test": part, "seconds": 0.0, **numbers, "trainable": 10}
