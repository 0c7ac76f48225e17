"""Tasks to fine-tune models on: their data, models, heads and metrics. Dropout is off everywhere."""

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.tasks.base import Batch, Data, Sizes, Task, TaskError, head_of, heads_of, on
from benchmarks.quality.tasks.classification import COLA, SST2
from benchmarks.quality.tasks.e2e import E2E
from benchmarks.quality.tasks.hub import hub_task
from benchmarks.quality.tasks.science import Science
from benchmarks.quality.tasks.solutions import Solutions

__all__ = ["TASKS", "Batch", "Data", "Sizes", "Task", "TaskError", "find_task", "head_of", "heads_of", "on"]

TASKS: dict[str, Task] = {"sst2": SST2, "cola": COLA, "e2e": E2E(), "gsm8k": Solutions(), "science": Science()}
"""The tasks that need no hub, by their names in grid files."""


def find_task(name: str, hub: Mapping[str, Any]) -> Task:
    """Return the task that the table `hub` describes or, if that is empty, the task `name` of `TASKS`.

    Raises:
        TaskError: the name is unknown, or the table is invalid.
    """
    if hub:
        return hub_task(hub)
    if name not in TASKS:
        raise TaskError(f"unknown; use one of {sorted(TASKS)}, or describe it in [tasks.{name}.hub]")
    return TASKS[name]
