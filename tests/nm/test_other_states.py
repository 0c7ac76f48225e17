"""States and calls that do not fit a pruned model are refused in one line, and leave it as it was."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from out_of_memory import run_out_at
from prune_two_ranks import Net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sylva_compile
from sylva_compile import NMMasks
from sylva_compile.errors import EmbedError, MaskError, ScopeError
from sylva_compile.schedules import MaskChange

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def pruned(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Net, NMMasks]:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    return model, masks


def with_adapters(rank: int, **options: Any) -> Net:
    """Make a pruned model whose adapters change its output."""
    model, _ = pruned()
    for parameter in sylva_compile.add_low_rank(model, rank, generator=torch.Generator().manual_seed(1), **options):
        with torch.no_grad():
            parameter.add_(parameter.eq(0).all() * 0.1)
    return model


def everything(model: nn.Module) -> list[Tensor]:
    """Return copies of all tensors of a pruned model, codes included."""
    held = [*model.state_dict().values()]
    for module in model.children():
        low_rank = module._nm_low_rank
        held += [module._nm_layout.codes, module._nm_layout.second]
        held += [] if low_rank is None or low_rank.codes is None else [low_rank.codes]
    return [tensor.detach().clone() for tensor in held]


def assert_refused(model: nn.Module, call: Callable[[], Any], message: str, error: type[Exception] = MaskError) -> None:
    before = everything(model)
    with pytest.raises(error, match=message):
        call()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_a_model_pruned_in_other_places(dtype: torch.dtype) -> None:
    _, others = pruned(1, dtype)
    model, masks = pruned(0, dtype)
    state = MaskChange(others).state_dict()
    assert_refused(model, lambda: MaskChange(masks).load_state_dict(state), r"one\.weight.*pruned in other places")


def test_the_state_of_another_checkpoint() -> None:
    model, masks = pruned(dtype=torch.bfloat16)
    schedule = MaskChange(masks, every=1)
    older = copy.deepcopy(schedule.state_dict())
    model(X.bfloat16()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    schedule.step()
    assert_refused(model, lambda: schedule.load_state_dict(older), r"one\.weight: the values in the state are not")
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(schedule.state_dict())
    again, masks_again = pruned(dtype=torch.bfloat16)
    again.load_state_dict(weights)
    MaskChange(masks_again, every=1).load_state_dict(state)
    assert all(torch.equal(one, other) for one, other in zip(everything(model), everything(again), strict=True))


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("prune", ["creation", "fold"])
def test_adapters_of_another_rank(rank: int, prune: str) -> None:
    model, state = with_adapters(4, prune=prune), with_adapters(rank, prune=prune).state_dict()
    assert_refused(model, lambda: model.load_state_dict(state), r"\(16, 4\); add adapters of the rank", RuntimeError)


@pytest.mark.parametrize("shape", [(14, 4), (20, 4), (16,)])
def test_adapters_of_another_shape(shape: tuple[int, ...]) -> None:
    model = with_adapters(4)
    state = {**model.state_dict(), "one.weight_left": torch.randn(shape)}
    assert_refused(model, lambda: model.load_state_dict(state), r"one\.weight: the adapter to load is", RuntimeError)


@pytest.mark.parametrize(("mine", "theirs"), [("creation", "fold"), ("fold", "creation")])
def test_adapters_that_are_pruned_at_another_time(mine: str, theirs: str) -> None:
    model, state = with_adapters(4, prune=mine), with_adapters(4, prune=theirs).state_dict()
    assert_refused(model, lambda: model.load_state_dict(state), f"prune='{theirs}'", RuntimeError)


def test_weights_without_adapters_are_read_without_them() -> None:
    plain, _ = pruned(seed=0)
    model = with_adapters(4)
    assert not torch.equal(model(X), plain(X))
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert "one.weight_right" in found.missing_keys
    assert torch.equal(model(X), plain(X))
    # In a state of several files a weight comes before its adapter, and both are kept.
    whole = with_adapters(4)
    names = list(whole.state_dict())
    assert names.index("one.weight") < min(names.index("one.weight_left"), names.index("one.weight_right"))
    for name, value in whole.state_dict().items():
        model.load_state_dict({name: value}, strict=False)
    assert torch.equal(model(X), whole(X))


def test_a_model_that_was_made_dense_is_not_pruned_again_by_a_schedule() -> None:
    model, masks = pruned()
    schedule = MaskChange(masks, every=1)
    state = schedule.state_dict()
    with torch.no_grad():
        for parameter in sylva_compile.add_low_rank(model, 4):
            parameter.add_(0.1)
    sylva_compile.unprune(model)
    weight = model.one.weight.clone()
    for call in (schedule.step, schedule.state_dict, lambda: schedule.load_state_dict(state)):
        with pytest.raises(EmbedError, match="not pruned"):
            call()
    assert type(model.one) is nn.Linear
    assert torch.equal(model.one.weight, weight)


def test_adapters_are_added_to_all_weights_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pruned()
    with monkeypatch.context() as patch:
        run_out_at(2, torch, "randn", patch)
        assert_refused(model, lambda: sylva_compile.add_low_rank(model, 2), "^$", torch.OutOfMemoryError)
    assert len(sylva_compile.add_low_rank(model, 2)) == 4


def test_folding_goes_on_where_it_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(2)
    wanted = model(X).detach()
    with monkeypatch.context() as patch:
        run_out_at(3, torch, "cat", patch)
        with pytest.raises(torch.OutOfMemoryError):
            sylva_compile.fold_low_rank(model)
    assert [module._nm_low_rank.folded is None for module in model.children()] == [False, True]
    sylva_compile.fold_low_rank(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted)
    with pytest.raises(EmbedError, match="folded already"):
        sylva_compile.fold_low_rank(model)


def test_adapters_after_freezing() -> None:
    model, masks = pruned()
    masks.freeze()
    with pytest.raises(EmbedError, match=r"one\.weight is frozen for inference; add adapters before"):
        sylva_compile.add_low_rank(model, 2)
    assert model.one._nm_low_rank is None


def test_a_projection_that_attention_multiplies_by_itself() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ScopeError, match=r"self_attn\.out_proj\.weight"):
        sylva_compile.prune_masks(layer)
    masks = sylva_compile.prune_masks(layer, scope=["linear1", "linear2"])
    masks.embed()
    assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 16)


@pytest.mark.parametrize("missing", ["double", "config"])
def test_a_file_of_masks_without_its_notes(missing: str, tmp_path: Path) -> None:
    _, masks = pruned()
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    (key,) = (name for name, text in meta.items() if '"double"' in text)
    notes = json.loads(meta[key])
    del notes[missing]
    save_file(load_file(path), path, {**meta, key: json.dumps(notes)})
    with pytest.raises(MaskError):
        NMMasks.load(path)
