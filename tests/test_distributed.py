"""DistributedDataParallel needs nothing special: blocks are parameters like any other."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from train_two_ranks import case_and_masks, train

import sylva_compile
from sylva_compile.blocks import ddp
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.schedules import LayerSchedule


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    two_ranks.run("train_two_ranks.py", tmp_path)
    case, masks = case_and_masks()
    train(case.model, masks, case.batch)
    alone = case.model.state_dict()
    for how in ("inside", "outside"):
        first, second = (torch.load(tmp_path / f"{how}{rank}") for rank in (0, 1))
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), f"{how}: ranks differ in {name}"
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Make a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_models_are_found(tmp_path: Path) -> None:
    case, masks = case_and_masks()
    model = torch.compile(case.model, backend="eager")
    masks.embed(model)
    sylva_compile.save_adapter(model, tmp_path / "adapter")
    sylva_compile.unload_adapter(model)
    assert list(sylva_compile.load_adapter(model, tmp_path / "adapter")) == list(masks)


@pytest.mark.usefixtures("alone")
class TestEmbeddedAfterWrapping:
    """DistributedDataParallel averages only parameters that it found when it was made; ranks would silently diverge."""

    def test_is_refused_where_the_wrapper_is_given(self, tmp_path: Path) -> None:
        case, masks = case_and_masks()
        masks.embed()
        model = DistributedDataParallel(case.model)
        masks.embed(model)
        sylva_compile.save_adapter(model, tmp_path / "adapter")
        sylva_compile.unload_adapter(model)
        with pytest.raises(EmbedError, match="then wrap"):
            masks.embed(model)
        with pytest.raises(EmbedError, match="then wrap"):
            sylva_compile.load_adapter(model, tmp_path / "adapter")
        assert not block_states(model)

    # DistributedDataParallel broadcasts buffers, which Dynamo does not trace.
    @pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
    @pytest.mark.parametrize("how", ["eager", "inside", "outside"])
    def test_is_refused_in_the_first_training_pass_otherwise(self, how: str) -> None:
        case, masks = case_and_masks()
        head = case.model.lm_head.weight.requires_grad_(True)
        model: torch.nn.Module = DistributedDataParallel(case.model)
        backend = sylva_compile.backend(masks, inner="aot_eager")
        if how == "inside":
            case.model.compile(backend=backend)
        elif how == "outside":
            model = torch.compile(model, backend=backend)
        with torch.no_grad():
            model(**case.batch)
        with pytest.raises(EmbedError, match="then wrap"):
            model(**case.batch)
        assert head.grad is None

    @pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
    def test_is_refused_after_a_pass_outside_of_the_wrapper(self) -> None:
        case, masks = case_and_masks()
        case.model.lm_head.weight.requires_grad_(True)
        model = DistributedDataParallel(case.model)
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
        case.model(**case.batch).loss.backward()
        with pytest.raises(EmbedError, match="then wrap"):
            model(**case.batch)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_wrapping_anew_is_enough(self, compiled: bool) -> None:
        case, masks = case_and_masks()
        case.model.lm_head.weight.requires_grad_(True)
        DistributedDataParallel(case.model)
        masks.embed()
        if compiled:
            case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
        for _ in range(2):
            DistributedDataParallel(case.model)(**case.batch).loss.backward()
        assert all(blocks.grad is not None for blocks in masks.parameters())


@pytest.mark.usefixtures("alone")
class TestWrapperThatCannotTrainBlocks:
    def test_mixed_precision_is_refused_before_anything_changes(self) -> None:
        case, masks = case_and_masks()
        masks.embed()
        before = {name: value.data_ptr() for name, value in case.model.named_parameters()}
        precision = _MixedPrecision(param_dtype=torch.bfloat16)
        with pytest.raises(EmbedError, match=r"load the model in bfloat16.*or use torch.autocast") as caught:
            DistributedDataParallel(case.model, mixed_precision=precision)
        assert "\n" not in str(caught.value)
        assert {name: value.data_ptr() for name, value in case.model.named_parameters()} == before
        DistributedDataParallel(case.model)(**case.batch).loss.backward()

    def test_mixed_precision_is_refused_in_the_first_training_pass_otherwise(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case, masks = case_and_masks()
        masks.embed()
        model = DistributedDataParallel(case.model)
        monkeypatch.setattr(ddp, "_wrappers", weakref.WeakKeyDictionary())
        model.mixed_precision = _MixedPrecision()
        with pytest.raises(EmbedError, match="mixed_precision"), model._inside_ddp_forward():
            case.model(**case.batch)

    def test_mixed_precision_of_a_model_without_blocks_is_not_our_business(self) -> None:
        _, masks = case_and_masks()
        case, _ = case_and_masks()
        masks.embed(case.model)
        other = torch.nn.Linear(2, 2)
        assert DistributedDataParallel(other, mixed_precision=_MixedPrecision()).mixed_precision is not None

    def test_blocks_that_were_frozen_when_it_was_made(self) -> None:
        case, masks = case_and_masks()
        schedule = LayerSchedule(masks, "random", fraction=0.5)
        model = DistributedDataParallel(case.model)
        model(**case.batch).loss.backward()
        schedule.close()
        with pytest.raises(EmbedError, match="wrap the model first, then make the LayerSchedule"):
            model(**case.batch)
        DistributedDataParallel(case.model)(**case.batch).loss.backward()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}])
def test_zero_optimizers_see_a_part_of_the_gradients(option: dict[str, Any]) -> None:
    _, masks = case_and_masks()
    with pytest.raises(ArgumentError, match=r"ZeroRedundancyOptimizer.*clip_grad_norm_"):
        ZeroRedundancyOptimizer(masks.parameters(), sylva_compile.AdamW, **option)
    ZeroRedundancyOptimizer(masks.parameters(), sylva_compile.AdamW)
    sylva_compile.AdamW(masks.parameters(), **option)


@pytest.mark.usefixtures("alone")
class TestCheckpointsOfTorch:
    """`torch.distributed.checkpoint.state_dict`: names without wrappers, and no blocks among the model's."""

    def test_state_dicts_of_the_model(self) -> None:
        case, masks = case_and_masks()
        masks.embed()
        model = DistributedDataParallel(case.model)
        train(model, masks, case.batch)
        wanted = {name: value.clone() for name, value in case.model.state_dict().items()}
        found = get_model_state_dict(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        other, masks = case_and_masks()
        masks.embed()
        set_model_state_dict(DistributedDataParallel(other.model).module, dict(wanted))
        assert all(torch.equal(other.model.state_dict()[name], value) for name, value in wanted.items())
        set_model_state_dict(DistributedDataParallel(case.model), found, options=StateDictOptions(strict=False))

    @pytest.mark.parametrize("make", [torch.optim.AdamW, sylva_compile.AdamW])
    def test_state_dicts_of_the_optimizer(self, make: type[torch.optim.Optimizer]) -> None:
        case, masks = case_and_masks()
        masks.embed()
        model = DistributedDataParallel(case.model)
        optimizer = make(masks.parameters())
        model(**case.batch).loss.backward()
        optimizer.step()
        saved = get_optimizer_state_dict(model, optimizer)
        assert set(saved["state"]) == {f"{name}_blocks" for name in masks}
        again = make(masks.parameters())
        optimizer.zero_grad()
        set_optimizer_state_dict(model, again, saved)
        for blocks in masks.parameters():
            for key, value in optimizer.state[blocks].items():
                assert torch.equal(torch.as_tensor(again.state[blocks][key]), torch.as_tensor(value)), key
