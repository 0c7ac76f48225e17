"""Parameters that lie in the memory of a weight with blocks."""

import pytest
import torch
from torch import nn

from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import EmbedError

EVERY_OTHER = torch.tensor([[True, False], [False, True]])


def tied_by_memory() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    model[1].weight.data = model[0].weight.data
    return model


def test_two_weights_with_blocks_are_refused() -> None:
    model = tied_by_memory()
    masks = Masks.from_block_maps(model, {"0.weight": EVERY_OTHER, "1.weight": ~EVERY_OTHER}, 8)
    with pytest.raises(EmbedError, match=r"0\.weight and 1\.weight are two Parameters in the same memory"):
        masks.embed(model)
    assert not block_states(model)


@pytest.mark.parametrize("masked", ["0.weight", "1.weight"])
def test_a_weight_that_is_trained_itself_is_refused(masked: str) -> None:
    model = tied_by_memory().requires_grad_(True)
    masks = Masks.from_block_maps(model, {masked: EVERY_OTHER}, 8)
    with pytest.raises(EmbedError, match="are two Parameters in the same memory"):
        masks.embed(model)


def test_a_frozen_weight_reads_what_the_blocks_learn() -> None:
    model = tied_by_memory()
    masks = Masks.from_block_maps(model, {"0.weight": EVERY_OTHER}, 8)
    masks.embed(model)
    model(torch.randn(3, 16)).sum().backward()
    torch.optim.SGD(masks.parameters(), lr=0.1).step()
    assert torch.equal(model[1].weight, model[0].weight)
