"""`changed_values` against the dense difference of state dicts."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_masks
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sylva_compile
from sylva_compile import BlockMask, Masks
from sylva_compile.adapters import changes
from sylva_compile.errors import AdapterError, EmbedError


class Net(nn.Module):
    """A plain layer, a transposed one, and a shared weight whose second name carries the mask."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.body = nn.Sequential(nn.Linear(width, inner), nn.GELU(), Conv1D(width, inner))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.table(ids)))
        return logits


def trained(
    width: int, inner: int, block_size: int, dtype: torch.dtype, moves: int, share: float
) -> tuple[nn.Module, nn.Module, Masks]:
    base = Net(width, inner).to(dtype).requires_grad_(False)
    model = copy.deepcopy(base)
    masks = random_masks(model, ["body.0.weight", "body.2.weight", "head.weight"], block_size, share)
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.05)
    for move in range(moves + 1):
        if move:
            maps = {name: mask.block_map().roll(move) for name, mask in masks.items()}
            masks.move({name: BlockMask.from_block_map(maps[name], masks[name].shape, block_size) for name in masks})
        model(torch.randint(0, 20, (4, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model, masks


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(8, 40),
    inner=st.integers(8, 40),
    block_size=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    moves=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_they_make_the_trained_model_of_a_fresh_base(
    width: int, inner: int, block_size: int, dtype: torch.dtype, moves: int, share: float
) -> None:
    width = max(width, block_size)
    base, model, _ = trained(width, inner, block_size, dtype, moves, share)
    found = {name: (indices, values) for name, indices, values in sylva_compile.changed_values(model)}
    # The first name of the shared weight.
    assert set(found) == {"body.0.weight", "body.2.weight", "table.weight"}
    wanted = model.state_dict()
    for name, before in base.state_dict().items():
        if name not in found:
            assert torch.equal(before, wanted[name]) or name == "head.weight"
            continue
        indices, values = found[name]
        assert indices.dtype == torch.int32
        assert values.dtype == dtype
        assert indices.dim() == values.dim() == 1
        assert indices.shape == values.shape
        assert indices.is_contiguous()
        assert values.is_contiguous()
        assert bool((indices[1:] > indices[:-1]).all())
        assert not len(indices) or (int(indices[0]) >= 0 and int(indices[-1]) < before.numel())
        differing = (before != wanted[name]).flatten().nonzero().flatten()
        assert bool(torch.isin(differing, indices).all())
        before.view(-1).index_copy_(0, indices.long(), values)
    assert all(torch.equal(value, wanted[name]) for name, value in base.state_dict().items())


def test_every_trained_place_is_there_even_if_it_holds_its_base_value() -> None:
    model = nn.Sequential(nn.Linear(20, 12))
    masks = random_masks(model, ["0.weight"], 8, 0.5)
    masks.embed()
    ((name, indices, values),) = sylva_compile.changed_values(model)
    assert name == "0.weight"
    assert torch.equal(indices.long(), masks["0.weight"].dense().flatten().nonzero().flatten())
    assert torch.equal(values, model[0].weight.flatten()[indices.long()])


def test_they_are_copies_of_what_an_edit_left() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    masks = random_masks(model, ["0.weight"], 8, 0.5)
    with torch.no_grad():
        masks.parameters()[0].fill_(7)
    ((_, _, values),) = sylva_compile.changed_values(model)
    assert bool((values == 7).all())
    with torch.no_grad():
        masks.parameters()[0].fill_(8)
    assert bool((values == 7).all())


def test_a_wrapper_is_not_in_the_name() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16))
    random_masks(model, ["0.weight"], 8, 0.5).embed()
    model[0] = torch.compile(model[0])
    assert [name for name, _, _ in sylva_compile.changed_values(torch.compile(model))] == ["0.weight"]


class TestRefused:
    def test_a_weight_beyond_32_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        random_masks(model, ["0.weight"], 8, 0.5).embed()
        monkeypatch.setattr(changes, "_MOST_ELEMENTS", 255)
        with pytest.raises(AdapterError, match=r"0\.weight has 256 elements.*send the whole weight\.$"):
            sylva_compile.changed_values(model)

    def test_a_model_without_blocks(self) -> None:
        with pytest.raises(AdapterError, match="carries no trained blocks"):
            sylva_compile.changed_values(nn.Linear(16, 16))

    def test_inside_of_disable_adapter(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        random_masks(model, ["0.weight"], 8, 0.5).embed()
        with sylva_compile.disable_adapter(model), pytest.raises(EmbedError, match="inside of disable_adapter"):
            sylva_compile.changed_values(model)

    def test_an_unknown_base(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        random_masks(model, ["0.weight"], 8, 0.5).embed()
        with torch.no_grad():
            model[0]._parameters["weight"].add_(1)
        with pytest.raises(EmbedError, match="its base is not known"):
            sylva_compile.changed_values(model)
