"""Adapters load and unload bit for bit, and never load onto another base."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import assert_invariant, random_masks
from torch import nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.adapters import format
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import AdapterError, EmbedError, SylvaError


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
        self.head = nn.Linear(30, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def trained(dtype: torch.dtype = torch.float32) -> tuple[Classifier, Classifier, Masks]:
    """Return a base, a copy of it with trained blocks and a trained head, and the masks."""
    base = Classifier().to(dtype)
    model = copy.deepcopy(base)
    masks = random_masks(model, ["body.0.weight", "body.2.weight"], 16, 0.5)
    optimizer = sylva_compile.AdamW([*masks.parameters(), *model.head.parameters()], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 40, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return base, model, masks


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_base_becomes_the_trained_model_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base, model, _ = trained(dtype)
    sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
    fresh = copy.deepcopy(base)
    masks = sylva_compile.load_adapter(fresh, tmp_path)
    assert same(fresh, model)
    assert_invariant(fresh, masks)
    assert torch.equal(fresh.get_parameter("body.0.weight_blocks"), model.get_parameter("body.0.weight_blocks"))
    sylva_compile.unload_adapter(fresh)
    assert same(fresh, base)
    assert type(fresh.body[0]) is nn.Linear


def test_unloading_after_training_restores_the_base(tmp_path: Path) -> None:
    base, model, _ = trained()
    sylva_compile.unload_adapter(model)
    assert torch.equal(model.body[0].weight, base.body[0].weight)
    assert torch.equal(model.body[2].weight, base.body[2].weight)


def test_unloading_a_plain_model_does_nothing() -> None:
    model = Classifier()
    sylva_compile.unload_adapter(model)
    assert type(model.head) is nn.Linear


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    base, model, _ = trained()
    sylva_compile.save_adapter(model, tmp_path)
    masks = sylva_compile.load_adapter(base, tmp_path)
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    base(torch.randn(8, 40)).square().mean().backward()
    optimizer.step()
    assert_invariant(base, masks)


def test_loading_into_the_same_masks_keeps_the_parameters(tmp_path: Path) -> None:
    _, model, masks = trained()
    sylva_compile.save_adapter(model, tmp_path)
    saved = [blocks.detach().clone() for blocks in masks.parameters()]
    held = masks.parameters()
    with torch.no_grad():
        for blocks in held:
            blocks.zero_()
    sylva_compile.load_adapter(model, tmp_path)
    assert all(a is b for a, b in zip(held, masks.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, saved, strict=True))
    assert_invariant(model, masks)


def test_merging_keeps_the_trained_values() -> None:
    _, model, _ = trained()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    sylva_compile.merge_and_unload(model)
    assert type(model.body[0]) is nn.Linear
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())


def test_switching_between_two(tmp_path: Path) -> None:
    base, first, _ = trained()
    second = copy.deepcopy(base)
    masks = random_masks(second, ["body.2.weight"], 8, 0.3)
    with torch.no_grad():
        masks.parameters()[0].add_(1.0)
    sylva_compile.save_adapter(first, tmp_path / "first")
    sylva_compile.save_adapter(second, tmp_path / "second")
    sylva_compile.load_adapter(base, tmp_path / "first")
    with pytest.raises(EmbedError, match="unload_adapter"):
        sylva_compile.load_adapter(base, tmp_path / "second")
    assert torch.equal(base.body[0].weight, first.body[0].weight)
    sylva_compile.unload_adapter(base)
    sylva_compile.load_adapter(base, tmp_path / "second")
    assert torch.equal(base.body[2].weight, second.body[2].weight)


def test_a_second_adapter_brings_back_the_head_of_the_base(tmp_path: Path) -> None:
    base, model, _ = trained()
    sylva_compile.save_adapter(model, tmp_path / "with", modules_to_save=["head"])
    sylva_compile.save_adapter(model, tmp_path / "without")
    fresh = copy.deepcopy(base)
    sylva_compile.load_adapter(fresh, tmp_path / "with")
    assert torch.equal(fresh.head.weight, model.head.weight)
    sylva_compile.load_adapter(fresh, tmp_path / "without")
    assert torch.equal(fresh.head.weight, base.head.weight)


def test_what_an_adapter_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, model, _ = trained()
    sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
    assert "2 trainable parameters outside of the blocks are not in this adapter, body.0.bias first" in caplog.text
    caplog.clear()
    model.body[0].bias.requires_grad_(False)
    model.body[2].bias.requires_grad_(False)
    sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
    assert not caplog.text


def test_another_frozen_weight_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Classifier().requires_grad_(False)
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    random_masks(model, ["body.0.weight"], 16, 0.5).embed()
    sylva_compile.save_adapter(model, tmp_path)
    sylva_compile.load_adapter(base, tmp_path)
    assert not caplog.text
    nn.init.normal_(other.head.weight)
    sylva_compile.load_adapter(other, tmp_path)
    assert "1 frozen weights or buffers are not those" in caplog.text
    assert "head.weight first" in caplog.text


def test_an_offloaded_weight_elsewhere_is_not_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, model, _ = trained()
    for each in (base, model):
        each.requires_grad_(False)
        each.spare = nn.Linear(5, 5, device="meta").requires_grad_(False)
    block_states(model)["body.0.weight"].blocks.requires_grad_(True)
    sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
    sylva_compile.load_adapter(base, tmp_path)
    assert not caplog.records
    assert torch.equal(base.body[2].weight, model.body[2].weight)
    base.to("meta")
    with pytest.raises(SylvaError, match="on the meta device"):
        sylva_compile.load_adapter(base, tmp_path)


def test_buffers_that_training_changed_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    model = copy.deepcopy(base)
    random_masks(model, ["0.weight"], 8, 0.5).embed(model)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    model(torch.randn(8, 16))
    sylva_compile.save_adapter(model, tmp_path)
    sylva_compile.load_adapter(base, tmp_path)
    assert "1.running_mean first" in caplog.text


def test_blocks_that_somebody_froze_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    masks = random_masks(model, ["0.weight"], 8, 0.5)
    masks.embed(model)
    wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["1"]))  # type: ignore[arg-type]
    assert not masks.parameters()[0].requires_grad
    wrapped.requires_grad_(False)
    sylva_compile.save_adapter(wrapped, tmp_path)
    assert "No block of this model requires grad" in caplog.text


class Normed(nn.Module):
    """A model whose head has running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Tied(nn.Module):
    """A model whose embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(ids)))


class TestProvenance:
    def test_an_adapter_keeps_the_settings_that_chose_its_blocks(self, tmp_path: Path) -> None:
        model = Classifier()
        base = copy.deepcopy(model)
        masks = sylva_compile.trace_and_mask(model, method="magnitude", block_size=8, sparsity=0.6)
        masks.embed()
        sylva_compile.save_adapter(model, tmp_path / "adapter")
        loaded = sylva_compile.load_adapter(base, tmp_path / "adapter")
        assert loaded.config == {**masks.config, "adapter": str(tmp_path / "adapter")}
        assert loaded.config["method"] == "magnitude"
        # And so does an adapter of the model that it was loaded into, or of a copy.
        sylva_compile.save_adapter(copy.deepcopy(base), tmp_path / "again")
        again = json.loads((tmp_path / "again" / format.CONFIG_NAME).read_text())
        assert again["masks"]["base"] == masks.config["base"]

    def test_settings_come_with_an_adapter_that_is_loaded_into_the_same_masks(self, tmp_path: Path) -> None:
        model = Classifier()
        base = copy.deepcopy(model)
        masks = sylva_compile.trace_and_mask(model, method="magnitude", block_size=8)
        masks.embed()
        sylva_compile.save_adapter(model, tmp_path / "one")
        Masks(dict(masks), model=base).embed()
        sylva_compile.load_adapter(base, tmp_path / "one")
        sylva_compile.save_adapter(base, tmp_path / "two")
        found = json.loads((tmp_path / "two" / format.CONFIG_NAME).read_text())["masks"]
        assert found["method"] == "magnitude"

    def test_loading_says_nothing_of_a_base_that_was_checked(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = Classifier()
        masks = sylva_compile.trace_and_mask(model, method="magnitude", block_size=8)
        model.bfloat16()
        base = copy.deepcopy(model)
        masks.embed()
        sylva_compile.save_adapter(model, tmp_path)
        caplog.clear()
        sylva_compile.load_adapter(base, tmp_path)
        assert "chosen for other weights" not in caplog.text

    def test_settings_that_json_lacks_are_no_reason_to_lose_a_training(self, tmp_path: Path) -> None:
        model = Classifier()
        masks = random_masks(model, ["head.weight"], 8, 0.5)
        masks.config = {"rate": torch.tensor(0.5), "device": torch.device("cpu"), "path": tmp_path}
        masks.embed()
        sylva_compile.save_adapter(model, tmp_path)
        found = json.loads((tmp_path / format.CONFIG_NAME).read_text())["masks"]
        assert found == {"rate": 0.5, "device": "cpu", "path": str(tmp_path)}

    def test_an_adapter_from_before_is_read(self, tmp_path: Path) -> None:
        model = Classifier()
        base = copy.deepcopy(model)
        sylva_compile.trace_and_mask(model, method="magnitude", block_size=8).embed()
        sylva_compile.save_adapter(model, tmp_path)
        path = tmp_path / format.CONFIG_NAME
        config = json.loads(path.read_text())
        del config["masks"]
        path.write_text(json.dumps(config))
        assert sylva_compile.load_adapter(base, tmp_path).config == {"adapter": str(tmp_path)}


class TestModulesToSave:
    def test_running_statistics_belong_to_the_module(self, tmp_path: Path) -> None:
        model = Normed()
        base = copy.deepcopy(model)
        fresh = copy.deepcopy(model)
        random_masks(model, ["body.weight"], 8, 0.5).embed()
        for _ in range(5):
            model(3 * torch.randn(8, 16) + 5)
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
        sylva_compile.load_adapter(fresh, tmp_path)
        assert same(fresh, model)
        sylva_compile.unload_adapter(fresh)
        assert same(fresh, base)

    def test_a_head_that_is_not_finite_is_not_saved(self, tmp_path: Path) -> None:
        _, model, _ = trained()
        with torch.no_grad():
            model.head.bias[0] = torch.nan
        with pytest.raises(AdapterError, match=r"head\.bias holds NaN"):
            sylva_compile.save_adapter(model, tmp_path / "out", modules_to_save=["head"])
        assert not (tmp_path / "out").exists()

    def test_a_head_of_another_dtype_is_not_rounded(self, tmp_path: Path) -> None:
        base, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
        base.head.to(torch.bfloat16)
        before = copy.deepcopy(base)
        with pytest.raises(AdapterError, match=r"torch\.bfloat16 here"):
            sylva_compile.load_adapter(base, tmp_path)
        assert same(base, before)

    def test_a_tied_tensor_is_stored_once(self, tmp_path: Path) -> None:
        model = Tied()
        base, fresh = copy.deepcopy(model), copy.deepcopy(model)
        random_masks(model, ["body.weight"], 8, 0.5).embed()
        with torch.no_grad():
            model.table.weight.add_(1)
        sylva_compile.save_adapter(model, tmp_path / "both", modules_to_save=["table", "head"])
        sylva_compile.save_adapter(model, tmp_path / "head", modules_to_save=["head"])
        # When the second adapter is loaded, the first has replaced the tensor under its other name.
        for name in ("both", "head"):
            sylva_compile.load_adapter(fresh, tmp_path / name)
            assert same(fresh, model)
        sylva_compile.unload_adapter(fresh)
        assert same(fresh, base)

    def test_the_other_name_of_a_masked_weight_is_masked(self, tmp_path: Path) -> None:
        model = Tied()
        base, fresh = copy.deepcopy(model), copy.deepcopy(model)
        masks = random_masks(model, ["table.weight"], 8, 0.5)
        with torch.no_grad():
            masks.parameters()[0].add_(1)
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
        sylva_compile.load_adapter(fresh, tmp_path)
        assert same(fresh, model)
        sylva_compile.unload_adapter(fresh)
        assert same(fresh, base)

    def test_a_masked_weight_in_a_module_to_save_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The adapter holds only the blocks of the head: a newly initialised head has other values around them."""
        model = Classifier()
        Masks.from_block_maps(model, {"head.weight": torch.ones(1, 4, dtype=torch.bool)}, 8).embed()
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
        assert "head.weight carries blocks, so that the adapter holds these and not all of the weight" in caplog.text

    def test_two_tensors_that_are_one_here(self, tmp_path: Path) -> None:
        model = Tied()
        fresh = copy.deepcopy(model)
        model.head.weight = nn.Parameter(model.table.weight.detach().clone())
        random_masks(model, ["table.weight"], 8, 0.5).embed()
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["head"])
        with pytest.raises(AdapterError, match=r"stores head\.weight whole, which is table\.weight with its blocks"):
            sylva_compile.load_adapter(fresh, tmp_path)
        assert type(fresh.table) is nn.Embedding

    @pytest.mark.parametrize("load_another", [False, True])
    def test_a_head_that_was_replaced_since(self, tmp_path: Path, load_another: bool) -> None:
        base, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path / "with", modules_to_save=["head"])
        sylva_compile.save_adapter(model, tmp_path / "without")
        sylva_compile.load_adapter(base, tmp_path / "with")
        old, base.head = base.head, nn.Linear(30, 7)
        before = copy.deepcopy(base.state_dict())
        act: Any = sylva_compile.unload_adapter
        if load_another:
            act = functools.partial(sylva_compile.load_adapter, directory=tmp_path / "without")
        with pytest.raises(AdapterError, match=r"head\.weight was \(3, 30\) .* is \(7, 30\) now"):
            act(base)
        assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
        base.head = old
        sylva_compile.unload_adapter(base)
        assert not torch.equal(base.head.weight, model.head.weight)


class TestFiles:
    def test_hold_blocks_and_positions_and_nothing_else(self, tmp_path: Path) -> None:
        _, model, masks = trained()
        sylva_compile.save_adapter(model, tmp_path)
        config = json.loads((tmp_path / format.CONFIG_NAME).read_text())
        tensors = tmp_path / config["tensors"]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([format.CONFIG_NAME, tensors.name])
        blocks = sum(mask.nnz * (16 * 16 * 4 + 8) for mask in masks.values())
        assert blocks < tensors.stat().st_size < blocks + 2048

    def test_saving_again_replaces_in_one_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base, model, masks = trained()
        sylva_compile.save_adapter(model, tmp_path)
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            masks.parameters()[0].add_(1.0)
        write = format.write_file

        def fail_at_the_config(path: Path, content: bytes) -> None:
            if path.name == format.CONFIG_NAME:
                raise OSError("disk full")
            write(path, content)

        monkeypatch.setattr(format, "write_file", fail_at_the_config)
        with pytest.raises(AdapterError, match="disk full"):
            sylva_compile.save_adapter(model, tmp_path)
        monkeypatch.undo()
        sylva_compile.load_adapter(base, tmp_path)
        assert torch.equal(base.body[0].weight, kept["body.0.weight"])
        sylva_compile.unload_adapter(base)
        sylva_compile.save_adapter(model, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        sylva_compile.load_adapter(base, tmp_path)
        assert torch.equal(base.body[0].weight, model.body[0].weight)


class TestRefusals:
    def refused(self, model: nn.Module, directory: Path, match: str) -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(SylvaError, match=match) as caught:
            sylva_compile.load_adapter(model, directory)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert [type(module) for module in model.modules()] == kinds

    def test_another_base(self, tmp_path: Path) -> None:
        base, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path)
        with torch.no_grad():
            base.body[2].weight[3, 7] += 1e-6
        self.refused(base, tmp_path, "another base: body.2.weight")

    def test_a_trained_model_is_another_base_for_its_own_adapter(self, tmp_path: Path) -> None:
        _, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path)
        sylva_compile.merge_and_unload(model)
        self.refused(model, tmp_path, "another base")

    def test_another_dtype(self, tmp_path: Path) -> None:
        base, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path)
        self.refused(base.bfloat16(), tmp_path, "bfloat16 here")

    def test_another_architecture(self, tmp_path: Path) -> None:
        _, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path)
        self.refused(nn.Sequential(nn.Linear(40, 50)), tmp_path, "which this model lacks")

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        base, model, _ = trained()
        sylva_compile.save_adapter(model, tmp_path)
        (path,) = tmp_path.glob("*.safetensors")
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        self.refused(base, tmp_path, "damaged")

    @pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": "other"}'])
    def test_a_foreign_config(self, tmp_path: Path, content: str) -> None:
        (tmp_path / format.CONFIG_NAME).write_text(content)
        self.refused(Classifier(), tmp_path, "damaged or no adapter|has format")

    def test_no_adapter_there(self, tmp_path: Path) -> None:
        self.refused(Classifier(), tmp_path, "does not exist")

    def test_saving_a_model_without_blocks(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="no trained blocks"):
            sylva_compile.save_adapter(Classifier(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_saving_blocks_that_are_not_finite(self, tmp_path: Path) -> None:
        _, model, masks = trained()
        with torch.no_grad():
            masks.parameters()[0][0, 0, 0] = torch.nan
        with pytest.raises(AdapterError, match="NaN"):
            sylva_compile.save_adapter(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_saving_after_a_write_past_autograd(self, tmp_path: Path) -> None:
        _, model, _ = trained()
        model.body[0]._parameters["weight"].data.zero_()
        with pytest.raises(EmbedError, match="past autograd"):
            sylva_compile.save_adapter(model, tmp_path / "out")

    @pytest.mark.parametrize("place", ["a file", "below a file"])
    def test_a_place_where_nothing_can_be_written(self, tmp_path: Path, place: str) -> None:
        _, model, _ = trained()
        (tmp_path / "file").write_text("mine")
        with pytest.raises(AdapterError, match="give a directory of yours") as caught:
            sylva_compile.save_adapter(model, tmp_path / ("file" if place == "a file" else "file/adapter"))
        assert "\n" not in str(caught.value)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_module_to_save_that_is_not_there(self, tmp_path: Path) -> None:
        _, model, _ = trained()
        with pytest.raises(AdapterError, match="'tail'"):
            sylva_compile.save_adapter(model, tmp_path / "out", modules_to_save=["tail"])
