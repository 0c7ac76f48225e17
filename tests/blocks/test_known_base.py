"""Edits in place of a dense weight: which of them leave the base known, and what happens to those that do not."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import EmbedError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

NAME = "0.weight"
BLOCK = (slice(0, 8), slice(0, 8))


def made() -> tuple[nn.Sequential, Masks, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
    masks = Masks.from_block_maps(model, {NAME: torch.eye(2, dtype=torch.bool)}, 8)
    base = model[0].weight.detach().clone()
    masks.embed(model)
    return model, masks, base


def train(model: nn.Sequential, masks: Masks) -> None:
    model(torch.randn(4, 16, dtype=model[0].bias.dtype)).square().sum().backward()
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


def clip_everything(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.1, 0.1)


def edit_outside(model: nn.Module) -> None:
    model.get_parameter(NAME)[0, 15] += 1


def edit_a_block(model: nn.Module) -> None:
    model.get_parameter(NAME)[BLOCK] += 1


def write_the_same(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.clone())


@pytest.mark.parametrize("edit", [clip_everything, edit_outside])
def test_an_edit_of_the_base_is_found(edit: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model, masks, _ = made()
    train(model, masks)
    with torch.no_grad():
        edit(model)
    train(model, masks)
    edited = model[0].weight.detach().clone()
    for call in (
        lambda: sylva_compile.save_adapter(model, tmp_path),
        lambda: sylva_compile.unload_adapter(model),
        lambda: sylva_compile.disable_adapter(model).__enter__(),
        lambda: model.to(torch.bfloat16) and sylva_compile.save_adapter(model, tmp_path),
    ):
        with pytest.raises(EmbedError, match=r"0\.weight was changed in place.*its base is not known"):
            call()
    assert not list(tmp_path.iterdir())
    assert torch.equal(model[0].weight, edited.bfloat16())
    assert torch.equal(sylva_compile.merge_and_unload(model)[0].weight, edited.bfloat16())


@pytest.mark.parametrize("edit", [edit_a_block, write_the_same])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_elsewhere_leaves_the_base(
    edit: Callable[[nn.Module], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, masks, base = made()
    model.to(dtype)
    train(model, masks)
    with torch.no_grad():
        edit(model)
    trained = model[0].weight.detach().clone()
    sylva_compile.save_adapter(model, tmp_path)
    sylva_compile.unload_adapter(model)
    assert torch.equal(model[0].weight, base.to(dtype))
    sylva_compile.load_adapter(model, tmp_path)
    assert torch.equal(model[0].weight, trained)


def test_a_moving_average_keeps_the_base() -> None:
    model, masks, base = made()
    average = AveragedModel(model, avg_fn=lambda mean, value, count: mean.lerp(value, 0.5))
    for _ in range(3):
        train(model, masks)
        average.update_parameters(model)
    assert not torch.equal(average.module[0].weight, base)
    sylva_compile.unload_adapter(average.module)
    assert torch.equal(average.module[0].weight, base)


def test_a_checkpoint_that_is_loaded_in_place_keeps_the_base(tmp_path: Path) -> None:
    model, masks, base = made()
    train(model, masks)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    again, _, _ = made()
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    again.load_state_dict(state["model"])
    assert torch.equal(again[0].weight, model[0].weight)
    sylva_compile.save_adapter(again, tmp_path / "adapter")
    sylva_compile.unload_adapter(again)
    assert torch.equal(again[0].weight, base)
    sylva_compile.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again[0].weight, model[0].weight)


def test_another_base_that_is_loaded_after_an_edit_is_the_base() -> None:
    model, masks, _ = made()
    train(model, masks)
    with torch.no_grad():
        edit_outside(model)
    other = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    train(model, masks)
    sylva_compile.unload_adapter(model)
    assert torch.equal(model[0].weight, other[NAME])


def test_a_copy_knows_what_its_model_knew() -> None:
    model, _, base = made()
    with torch.no_grad():
        edit_outside(model)
    assert not next(iter(block_states(copy.deepcopy(model)).values())).base_known
    intact, _, _ = made()
    sylva_compile.unload_adapter(twin := copy.deepcopy(intact))
    assert torch.equal(twin[0].weight, base)
