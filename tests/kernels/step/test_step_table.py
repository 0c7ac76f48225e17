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
    moved = torch.zeros(7, block_size, block_size)
    slots.append(slot(7 * area)._replace(param=moved, born=torch.zeros(7)))
    table.describe(slots, [one.param for one in slots])
    for row, one in enumerate(slots):
        firsts = table.tiles[table.tiles[:, 0] == row, 1].tolist()
        is_blocks = one.target is not None or one.born is not None
        size = max(4096 // area, 1) * area if whole and is_blocks else 4096
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


def test_blocks_with_ages_are_known_as_blocks() -> None:
    table = StepTable(CPU, 4096, whole_blocks=True, stochastic=False)
    gradients = [torch.ones(10), torch.ones(3, 8, 8)]
    moved = Slot(torch.zeros(3, 8, 8), (torch.zeros(3, 8, 8),), torch.zeros(()), 0, 0, None)
    table.describe([slot(10), moved], gradients)
    assert not table.has_ages
    assert table.rows[1, COLUMNS.index("BLOCK")] == 0
    moved = moved._replace(born=torch.zeros(3))
    table.describe([slot(10), moved], gradients)
    assert table.has_ages
    assert moved.born is not None
    assert table.rows[:, COLUMNS.index("BORN")].tolist() == [0, moved.born.data_ptr()]
    assert table.rows[:, COLUMNS.index("BLOCK")].tolist() == [0, 8]
    assert table.rows[:, COLUMNS.index("DENSE")].tolist() == [0, 0]
    assert table.rows[:, len(COLUMNS)].tolist()[1] == moved.states[0].data_ptr()
    table.describe([slot(10)], gradients[:1])
    assert not table.has_ages


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
