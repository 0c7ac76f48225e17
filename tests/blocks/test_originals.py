import torch

from sylva_compile import BlockMask
from sylva_compile.blocks.originals import Originals


def places(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs).t().contiguous()


def test_a_place_keeps_the_value_that_it_had_first() -> None:
    weight = torch.randn(20, 12)
    before = weight.clone()
    store = Originals(weight, places((0, 0), (1, 1)), 8)
    weight.zero_()
    store.add(weight, places((0, 1), (1, 1), (2, 0)))
    expected = torch.zeros(20, 12)
    expected[:8, :8], expected[8:16, 8:] = before[:8, :8], before[8:16, 8:]
    weight.fill_(1.0)
    weight[:8, 8:] = 2.0
    store.restore(weight)
    # Never trained: (1, 0) and (2, 1). Seen when they were zero: (0, 1) and (2, 0).
    expected[8:16, :8] = expected[16:, 8:] = 1.0
    assert torch.equal(weight, expected)
    assert torch.equal(store.places, places((0, 0), (0, 1), (1, 1), (2, 0)))


def test_it_holds_at_most_one_copy_of_the_weight() -> None:
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    every = BlockMask.from_block_map(torch.ones(8, 8), (64, 64), 8).positions
    store = Originals(weight, every[:, :3], 8)
    for first in range(0, 64, 3):
        store.add(weight, every[:, first : first + 3])
        store.add(weight, every[:, first : first + 2])
    assert store.nbytes <= weight.nbytes + 8 * 64
    restored = torch.zeros_like(weight)
    store.restore(restored)
    assert torch.equal(restored, weight)


def test_fill_sets_known_places_alone() -> None:
    weight = torch.ones(10, 10)
    Originals(weight, places((0, 1), (1, 1)), 8).fill(weight, 0.0)
    assert weight[:, :8].all() and not weight[:, 8:].any()
