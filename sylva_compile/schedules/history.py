"""The entries about schedules in the log of a training, for reports."""

from collections.abc import Iterable
from typing import Any

from sylva_compile.blocks.embed import block_states
from sylva_compile.schedules.layers import LayerSchedule
from sylva_compile.schedules.moving import MovingBlocks
from sylva_compile.schedules.protocol import Schedule


def history_entry(schedules: Iterable[Schedule]) -> dict[str, Any]:
    """Return plain values that tell where `schedules` are.

    `moves` is the number of moves so far, `places` the share of the blocks of all masked weights that have been trained
    so far, and `importance` the score of each layer, by its name. A schedule of another kind adds nothing.
    """
    entry: dict[str, Any] = {}
    for schedule in schedules:
        if isinstance(schedule, MovingBlocks):
            entry |= {"moves": schedule.moves, "places": _share_trained(schedule)}
        elif isinstance(schedule, LayerSchedule):
            entry["importance"] = {row.name: row.score for row in schedule.report().layers}
    return entry


def _share_trained(schedule: MovingBlocks) -> float:
    model = schedule.masks.model
    assert model is not None, "a schedule's masks are bound"
    states = block_states(model).values()
    trained = sum(state.originals.count for state in states)
    return trained / sum(state.originals.most for state in states)
