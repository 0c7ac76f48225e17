"""Tables cover every element once and are sent anew only when a row is another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylva_compile.kernels.step.table import COLUMNS, STOCHASTIC, Slot, StepTable, Target

CPU = torch.device("cpu")


def slot(count: int, target: Target | None = None, dtype: torch.dtype = torch.float32) -> Slot:
    return Slot(torch.zeros(count), (torch.zeros(count, dtype=dtype),), torch.zeros(()), 0, 0, target)


@given(st.lists(st.integers(0, 5000), max_size=6), st.booleans(), st.sampled_from([8, 24, 100]))
def test_tiles_cover_every_element_once(blocks: list[int], whole: bool, block_size: int) -> None:
    table = StepTable(CPU, 4096, whole_blocks=whole, stochastic=False)
    area = block_size * block_size
    slots = [slot(count) for count in blocks]
    weight = torch.zeros(block_size, 7 * block_size)
    slots.append(slot(7 * area, Target(weight, torch.zeros(2, 7, dtype=torch.int64), block_size, True)))
    table.describe(slots, [one.param for one in slots])
    for row, one in enumerate(slots):
        firsts = table.tiles[table.tiles[:, 0] == row, 1].tolist()
        size = max(4096 // area, 1) * area if whole and one.target is not None else 4096
        assert firsts == list(range(0, one.param.numel(), size))


def test_rows_are_sent_when_one_is_another() -> None:
    table = StepTable(CPU, 4096, whole_blocks=True, stochastic=False)
    first, second = slot(10), slot(20)
    table.describe([first, second], [torch.ones(10), torch.ones(20)])
    kept = table.rows
    table.describe([first, second], [torch.ones(10), None])
    assert table.rows is kept
    assert table.gradients[1] == 0
    table.describe([first, second._replace(group=1)], [None, None])
    assert table.rows is not kept
    assert table.rows[1, COLUMNS.index("HYPER")] == 1


def test_an_empty_gradient_is_not_a_missing_one() -> None:
    table = StepTable(CPU, 4096, whole_blocks=True, stochastic=False)
    empty = slot(0)
    table.describe([empty, empty], [torch.ones(0), None])
    assert table.gradients[0] != 0
    assert table.gradients[1] == 0


@pytest.mark.parametrize("stochastic", [False, True])
def test_bfloat16_states_are_marked_for_stochastic_rounding(stochastic: bool) -> None:
    table = StepTable(CPU, 4096, whole_blocks=True, stochastic=stochastic)
    table.describe([slot(10, dtype=torch.bfloat16)], [torch.ones(10)])
    assert (table.rows[0, -1] == STOCHASTIC) == stochastic
