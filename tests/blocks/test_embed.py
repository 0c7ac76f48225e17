"""Blocks and dense weights stay equal, whichever of the two is written."""

import copy
import gc
import importlib.util
import io
import pickle
import pickletools
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_invariant, blocks_by_loops, random_masks
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing._internal.two_tensor import TwoTensor

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks import base_warnings, registry
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.registry import live_states
from sylva_compile.errors import EmbedError

NAMES = ["0.weight", "2.weight"]


def small() -> tuple[nn.Sequential, Masks]:
    model = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
    return model, random_masks(model, NAMES, 16, 0.5)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, width: int = 40) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, width)).square().mean().backward()
    optimizer.step()


class Raw(torch.optim.Optimizer):
    """An optimizer that writes through `.data`, so that autograd's version counters do not change."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


class TestEmbed:
    def test_freezes_the_weight_and_nothing_else(self) -> None:
        model, masks = small()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        masks.embed()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {"0.bias", "2.bias", "0.weight_blocks", "2.weight_blocks"}
        for name, value in before.items():
            assert torch.equal(model.get_parameter(name), value)

    def test_blocks_are_float32_in_the_order_of_the_mask(self) -> None:
        model, masks = small()
        model.bfloat16()
        masks.embed()
        for name, mask in masks.items():
            blocks = model.get_parameter(name + "_blocks")
            assert blocks.dtype == torch.float32
            assert torch.equal(blocks, blocks_by_loops(model.get_parameter(name).detach().float(), mask))

    def test_twice_is_once(self) -> None:
        model, masks = small()
        masks.embed()
        blocks = masks.parameters()
        Masks(masks, model=model).embed()
        assert all(a is b for a, b in zip(blocks, masks.parameters(), strict=True))

    def test_other_masks_are_refused_and_leave_the_model_alone(self) -> None:
        model, masks = small()
        masks.embed()
        blocks = masks.parameters()
        other = random_masks(model, NAMES, 8, 0.5)
        with pytest.raises(EmbedError, match="unload_adapter"):
            other.embed()
        assert all(a is b for a, b in zip(blocks, masks.parameters(), strict=True))

    def test_unembed_leaves_an_ordinary_model(self) -> None:
        model, masks = small()
        masks.embed()
        sylva_compile.merge_and_unload(model)
        assert type(model[0]) is nn.Linear
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert model[0].weight.requires_grad
        assert isinstance(model[0].weight, nn.Parameter)

    def test_a_frozen_model_stays_frozen_after_unembed(self) -> None:
        model, masks = small()
        model.requires_grad_(False)
        masks.embed()
        sylva_compile.merge_and_unload(model)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_get_parameter_finds_the_dense_weight(self) -> None:
        model, masks = small()
        masks.embed()
        assert model.get_parameter("0.weight").shape == (50, 40)

    def test_a_shared_weight_has_one_set_of_blocks(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 32, bias=False))
        model[2].weight = model[0].weight
        reference = copy.deepcopy(model)
        masks = random_masks(model, ["0.weight"], 16, 0.6)
        masks.embed()
        assert model[0].weight_blocks is model[2].weight_blocks
        x = torch.randn(5, 32)
        model(x).square().mean().backward()
        reference(x).square().mean().backward()
        gathered = blocks_by_loops(reference[0].weight.grad, masks["0.weight"])
        torch.testing.assert_close(model[0].weight_blocks.grad, gathered)

    @pytest.mark.parametrize("how", ["assign", "load"])
    def test_a_shared_weight_is_replaced_in_all_who_share_it(self, how: str) -> None:
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.GELU(), nn.Linear(32, 32, bias=False))
        model[2].weight = model[0].weight
        masks = random_masks(model, ["0.weight"], 16, 0.6)
        masks.embed()
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            if how == "assign":
                twin[0].weight = nn.Parameter(torch.randn(32, 32))
            else:
                twin.load_state_dict({key: value + 1 for key, value in twin.state_dict().items()}, assign=True)
            assert twin[0]._parameters["weight"] is twin[2]._parameters["weight"]
            bound = Masks(masks, model=twin)
            step(twin, torch.optim.SGD(bound.parameters(), lr=0.1), width=32)
            assert_invariant(twin, bound)
            assert not torch.equal(twin[0].weight, model[0].weight) or twin is model

    def test_tying_a_weight_to_itself(self) -> None:
        case = tiny("gpt2")
        masks = sylva_compile.trace_and_mask(case.model, method="random", scope=["lm_head"], block_size=8)
        masks.embed()
        case.model.tie_weights()
        assert_invariant(case.model, masks)
        assert case.model.lm_head._parameters["weight"] is case.model.transformer.wte._parameters["weight"]

    def test_any_module_and_attribute_name(self) -> None:
        class Bilinear(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.kernel = nn.Parameter(torch.randn(24, 40))

            def forward(self, x: Tensor) -> Tensor:
                return x @ self.kernel.t()

        model = Bilinear()
        masks = random_masks(model, ["kernel"], 8, 0.5)
        masks.embed()
        x = torch.randn(3, 40)
        model(x).sum().backward()
        wanted = blocks_by_loops(torch.ones(24, 3) @ x, masks["kernel"])
        torch.testing.assert_close(model.kernel_blocks.grad, wanted)


class TestOneValue:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_torch_optimizer_writes_through(self, kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
        model, masks = small()
        model.to(dtype)
        masks.embed()
        outside = {name: model.get_parameter(name).detach()[~mask.dense()].clone() for name, mask in masks.items()}
        optimizer = kind(masks.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 40, dtype=dtype)).square().mean().backward()
            optimizer.step()
            assert_invariant(model, masks)
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name).detach()[~mask.dense()], outside[name])

    def test_a_step_without_gradients_leaves_other_backward_passes_alone(self) -> None:
        (first, masks), (second, others) = small(), small()
        optimizer = torch.optim.SGD([*masks.parameters(), *others.parameters()], lr=0.1)
        pending = first(torch.randn(2, 40, requires_grad=True)).sum()
        second(torch.randn(2, 40)).sum().backward()
        optimizer.step()
        assert_invariant(second, others)
        pending.backward()

    def test_gradients_follow_to_another_dtype(self) -> None:
        model, masks = small()
        masks.embed()
        model(torch.randn(2, 40)).sum().backward()
        wanted = masks.parameters()[0].grad.clone()
        model.bfloat16()
        assert masks.parameters()[0].grad.dtype == torch.float32
        torch.testing.assert_close(masks.parameters()[0].grad, wanted, rtol=1e-2, atol=1e-2)
        torch.optim.AdamW(masks.parameters()).step()
        assert_invariant(model, masks)

    def test_masters_keep_what_bfloat16_cannot(self) -> None:
        model, masks = small()
        model.bfloat16()
        masks.embed()
        blocks = masks.parameters()[0]
        start = blocks.detach().clone()
        for _ in range(100):
            blocks.grad = torch.full_like(blocks, 1e-6)
            torch.optim.SGD([blocks], lr=1.0).step()
        torch.testing.assert_close(blocks.detach(), start - 1e-4, rtol=0, atol=2e-6)

    def test_an_optimizer_that_writes_past_autograd(self) -> None:
        model, masks = small()
        masks.embed()
        before = model[0].weight.detach().clone()
        Raw(masks.parameters(), {}).step()
        assert_invariant(model, masks)
        assert not torch.equal(model[0].weight, before)

    def test_a_step_by_hand(self) -> None:
        model, masks = small()
        masks.embed()
        with torch.no_grad():
            for blocks in masks.parameters():
                blocks.add_(0.25)
        model(torch.randn(2, 40))
        assert_invariant(model, masks)

    @pytest.mark.parametrize("gradients", [True, False], ids=["training", "evaluation"])
    def test_a_step_by_hand_before_a_compiled_call(self, gradients: bool) -> None:
        model, masks = small()
        compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager"))
        x = torch.randn(2, 40)
        with torch.set_grad_enabled(gradients):
            compiled(x)
            with torch.no_grad():
                for blocks in masks.parameters():
                    blocks.add_(0.25)
            out = compiled(x)
        assert_invariant(model, masks)
        sylva_compile.merge_and_unload(model)
        torch.testing.assert_close(out, model(x))

    def test_a_dense_weight_changed_in_place(self) -> None:
        model, masks = small()
        masks.embed()
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        step(model, torch.optim.SGD(masks.parameters(), lr=0.0))
        assert_invariant(model, masks)
        wanted = blocks_by_loops(model[0].weight.detach(), masks["0.weight"])
        assert torch.equal(model[0].weight_blocks.detach(), wanted)

    def test_an_assigned_weight_is_read(self) -> None:
        model, masks = small()
        masks.embed()
        model[0].weight = nn.Parameter(torch.randn(50, 40))
        assert_invariant(model, masks)
        step(model, torch.optim.SGD(masks.parameters(), lr=0.1))
        assert_invariant(model, masks)

    def test_to_another_dtype_and_back(self) -> None:
        model, masks = small()
        masks.embed()
        exact = masks.parameters()[0].detach().clone()
        model.bfloat16()
        assert model[0].weight.dtype == torch.bfloat16
        assert torch.equal(masks.parameters()[0].detach(), exact)
        assert_invariant(model, masks)
        model.float()
        assert_invariant(model, masks)
        assert torch.equal(blocks_by_loops(model[0].weight.detach(), masks["0.weight"]), exact)

    def test_a_copy_has_its_own_life(self) -> None:
        model, masks = small()
        masks.embed()
        twin = copy.deepcopy(model)
        original = model[0].weight.detach().clone()
        bound = Masks(masks, model=twin)
        step(twin, torch.optim.SGD(bound.parameters(), lr=1.0))
        assert_invariant(twin, masks)
        assert torch.equal(model[0].weight, original)
        assert not torch.equal(twin[0].weight, original)

    def test_pickle_and_torch_save(self) -> None:
        model, masks = small()
        masks.embed()
        for twin in (pickle.loads(pickle.dumps(model)), _through_torch_save(model)):
            assert torch.equal(twin[0].weight, model[0].weight)
            bound = Masks(masks, model=twin)
            step(twin, torch.optim.SGD(bound.parameters(), lr=1.0))
            assert_invariant(twin, masks)

    def test_optimizers_are_followed_where_a_model_was_only_unpickled(self) -> None:
        model, masks = small()
        masks.embed()
        pickled = pickle.dumps(model)
        # As in a worker of torch.multiprocessing.spawn, where nothing was ever embedded.
        while registry._hooks:
            registry._hooks.pop().remove()
        twin = pickle.loads(pickled)
        Raw(Masks(masks, model=twin).parameters(), {}).step()
        assert_invariant(twin, masks)

    def test_parametrizations_elsewhere_are_not_disturbed(self) -> None:
        model, masks = small()
        parametrize.register_parametrization(model[0], "bias", nn.Tanh())
        masks.embed()
        model(torch.randn(2, 40)).sum().backward()
        assert model[0].weight_blocks.grad is not None

    def test_a_move_does_not_choose_between_two_values(self) -> None:
        model, masks = small()
        masks.embed(model)
        model[0]._parameters["weight"].data += 1
        with pytest.raises(EmbedError, match=r"0\.weight: blocks and dense weight differ.*write_through"):
            model.to(torch.float64)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        masks.write_through()
        assert_invariant(model.to(torch.float64), masks)

    def test_what_became_nan_can_be_moved(self) -> None:
        model, masks = small()
        with torch.no_grad():
            masks.parameters()[0].fill_(torch.nan)
        model.to(torch.bfloat16)
        assert model[0].weight.isnan().any()

    def test_a_tied_weight_through_the_meta_device(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].weight = model[0].weight
        state = copy.deepcopy(model.state_dict())
        masks = random_masks(model, ["0.weight"], 16, 0.5)
        masks.embed(model)
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state)
        assert model[1]._parameters["weight"] is model[0]._parameters["weight"]
        assert_invariant(model, masks)
        model(torch.randn(4, 32)).sum().backward()
        assert model[0].weight_blocks.grad.any()

    def test_index_tensors_ignore_the_default_device(self) -> None:
        model, _ = small()
        x = torch.randn(4, 40)
        with torch.device("meta"):
            options = {"loss_fn": lambda model, x: model(x).square().mean(), "num_samples": 4, "progress": False}
            masks = sylva_compile.trace_and_mask(model, [x], block_size=16, sparsity=0.5, column_budget=0.9, **options)
            assert masks["0.weight"].dense().device.type == "cpu"
            model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
            optimizers = [
                sylva_compile.AdamW(masks.parameters(), lr=0.1, max_grad_norm=1.0),
                sylva_compile.optim.SGD(masks.parameters(), lr=0.1, state_dtype=torch.bfloat16),
            ]
            for optimizer in optimizers:
                model(x).square().mean().backward()
                optimizer.step()
        assert_invariant(model, masks)


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


class TestAssignedData:
    """`weight.data = values`, as PEFT writes what it merges."""

    @pytest.mark.parametrize("safe", [True, False])
    @pytest.mark.parametrize("gradients", [True, False])
    def test_an_adapter_of_peft_is_merged(self, safe: bool, gradients: bool) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        wrapped: Any = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        masks = random_masks(wrapped, ["base_model.model.0.base_layer.weight"], 8, 0.5)
        masks.embed(wrapped)
        x = torch.randn(4, 32)
        want = wrapped(x)
        with torch.set_grad_enabled(gradients):
            merged = wrapped.merge_and_unload(safe_merge=safe)
        assert_invariant(merged, {"0.weight": masks["base_model.model.0.base_layer.weight"]})
        torch.testing.assert_close(merged.to("cpu")(x), want)
        with pytest.raises(EmbedError, match="its base is not known"):
            sylva_compile.unload_adapter(merged)

    @pytest.mark.parametrize("trained", [True, False])
    def test_is_copied_and_read(self, trained: bool) -> None:
        model, masks = small()
        masks.embed(model)
        model[0].weight_blocks.requires_grad_(trained)
        values = torch.randn(50, 40)
        model[0].weight.data = values
        assert torch.equal(model[0]._sylva_states["weight"].weight, values)
        assert_invariant(model, masks)
        assert not model[0]._sylva_states["weight"].base_known
        with pytest.raises(EmbedError, match=r"takes data of shape \(50, 40\), not \(40, 50\)"):
            model[0].weight.data = values.T

    def test_reading_gives_ordinary_tensors_elsewhere(self) -> None:
        model, masks = small()
        masks.embed(model)
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter)
        assert {type(weight.data), type(weight * 2), type(weight.detach())} == {Tensor}
        file = io.BytesIO()
        torch.save(weight, file)
        file.seek(0)
        assert torch.equal(torch.load(file), weight)

    def test_a_compiled_function_takes_what_was_read(self) -> None:
        model, masks = small()
        masks.embed(model)
        x = torch.randn(4, 40)
        compiled = torch.compile(lambda x, weight: F.linear(x, weight), backend="aot_eager", fullgraph=True)
        compiled(x, model[0].weight).square().sum().backward()
        found = masks.parameters()[0].grad
        masks.parameters()[0].grad = None
        F.linear(x, model[0].weight).square().sum().backward()
        torch.testing.assert_close(found, masks.parameters()[0].grad)


class TestStateDict:
    def test_shows_none_of_it(self) -> None:
        model, masks = small()
        plain = {key: value.clone() for key, value in model.state_dict().items()}
        masks.embed()
        shown = model.state_dict()
        assert list(shown) == list(plain)
        assert all(torch.equal(shown[key], plain[key]) for key in plain)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loading_reads_the_blocks_again(self, assign: bool) -> None:
        model, masks = small()
        masks.embed()
        other, _ = small()
        torch.manual_seed(1)
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        result = model.load_state_dict(other.state_dict(), assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(model[0].weight, other[0].weight)
        assert_invariant(model, masks)
        step(model, torch.optim.SGD(masks.parameters(), lr=0.1))
        assert_invariant(model, masks)

    def test_a_checkpoint_of_other_masks_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        base_warnings.warn_of_another_base.cache_clear()
        model, masks = small()
        base = copy.deepcopy(model)
        masks.embed()
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        resumed = copy.deepcopy(base)
        Masks(masks, model=resumed).embed()
        resumed.load_state_dict(model.state_dict())
        assert not caplog.text
        torch.manual_seed(5)
        random_masks(base, NAMES, 16, 0.5).embed()
        base.load_state_dict(model.state_dict())
        assert "training with other masks" in caplog.text

    def test_a_trained_model_loads_into_an_ordinary_one(self) -> None:
        model, masks = small()
        masks.embed()
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        plain = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
        plain.load_state_dict(model.state_dict())
        x = torch.randn(3, 40)
        assert torch.equal(plain(x), model(x))


class TestGradients:
    def test_accumulate_clip_and_scale_like_any_parameter(self) -> None:
        model, masks = small()
        masks.embed()
        x = torch.randn(4, 40)
        model(x).sum().backward()
        once = masks.parameters()[0].grad.clone()
        model(x).sum().backward()
        torch.testing.assert_close(masks.parameters()[0].grad, 2 * once)
        norm = nn.utils.clip_grad_norm_(masks.parameters(), 1e-3)
        assert norm > 0

    def test_the_dense_weight_never_trains_even_if_unfrozen(self) -> None:
        model, masks = small()
        masks.embed()
        model.requires_grad_(True)
        model(torch.randn(2, 40)).sum().backward()
        assert all(model.get_parameter(name).grad is None for name in NAMES)
        assert model[0].weight_blocks.grad is not None

    @pytest.mark.parametrize("compiled", [True, False])
    def test_nor_while_its_blocks_are_frozen(self, compiled: bool) -> None:
        model, masks = small()
        masks.embed()
        model.requires_grad_(True)
        model[0].weight_blocks.requires_grad_(False)
        run = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager")) if compiled else model
        run(torch.randn(2, 40)).sum().backward()
        assert all(model.get_parameter(name).grad is None for name in NAMES)
        assert model[0]._parameters["weight"].grad is None
        assert model[0].weight_blocks.grad is None
        assert model[2].weight_blocks.grad is not None

    def test_no_gradient_no_marker(self) -> None:
        model, masks = small()
        masks.embed()
        with torch.no_grad():
            assert model[0].weight.grad_fn is None
        for blocks in masks.parameters():
            blocks.requires_grad_(False)
        assert model[0].weight.grad_fn is None

    def test_a_forward_copies_nothing(self) -> None:
        model, masks = small()
        masks.embed()
        assert model[0].weight.data_ptr() == model[0]._parameters["weight"].data_ptr()

    def test_a_penalty_on_the_gradient_of_inputs(self) -> None:
        model, masks = small()
        dense = copy.deepcopy(model)
        masks.embed(model)
        x = torch.randn(4, 40, requires_grad=True)
        for each in (dense, model):
            [slope] = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        for name, blocks in zip(masks, masks.parameters(), strict=True):
            torch.testing.assert_close(blocks.grad, blocks_by_loops(dense.get_parameter(name).grad, masks[name]))

    def test_a_use_that_is_no_product_is_right_too(self) -> None:
        table = nn.Embedding(24, 16)
        masks = random_masks(table, ["weight"], 8, 0.5)
        masks.embed()
        ids = torch.tensor([1, 5, 5, 20])
        table(ids).sum().backward()
        counts = F.one_hot(ids, 24).sum(0).float()[:, None].expand(24, 16)
        assert torch.equal(table.weight_blocks.grad, blocks_by_loops(counts, masks["weight"]))


class TestPendingEdits:
    """A write that is not yet copied to the other side survives the next operation on the model."""

    @pytest.mark.parametrize("side", ["blocks", "dense"])
    @pytest.mark.parametrize("then", ["to", "state_dict", "deepcopy", "torch.save", "merge", "forward", "step"])
    def test_survive(self, side: str, then: str) -> None:
        model, masks = small()
        masks.embed()
        mask = masks["0.weight"]
        with torch.no_grad():
            if side == "blocks":
                model.get_parameter("0.weight_blocks").add_(1.0)
                wanted = blocks_by_loops(model.get_parameter("0.weight_blocks")[:, :8, :8].new_ones(50, 40), mask)
                wanted = wanted * model.get_parameter("0.weight_blocks")
            else:
                model[0]._parameters["weight"].mul_(2.0)
                wanted = blocks_by_loops(model[0]._parameters["weight"], mask)
            wanted = wanted.clone()
        found = model
        if then == "to":
            model.to("cpu")
        elif then == "state_dict":
            found = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
            found.load_state_dict(model.state_dict())
        elif then == "deepcopy":
            found = copy.deepcopy(model)
        elif then == "torch.save":
            found = _through_torch_save(model)
        elif then == "merge":
            sylva_compile.merge_and_unload(model)
        elif then == "forward":
            model(torch.randn(2, 40))
        else:
            step(model, torch.optim.SGD(masks.parameters(), lr=0.0))
        assert torch.equal(blocks_by_loops(found[0]._parameters["weight"].detach(), mask), wanted)
        if then not in ("state_dict", "merge"):
            assert_invariant(found, masks)

    def test_blocks_win_where_both_moved(self) -> None:
        """A weight average changes both; the changes are too small for the dense bfloat16 weights to move."""
        model, masks = small()
        model.bfloat16()
        masks.embed()
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        )
        start = average.module[0].weight_blocks.detach().clone()
        average.update_parameters(model)
        with torch.no_grad():
            for blocks in masks.parameters():
                blocks.add_(0.05)
        for _ in range(200):
            average.update_parameters(model)
            average(torch.randn(2, 40, dtype=torch.bfloat16))
        inside = blocks_by_loops(torch.ones(50, 40), masks["0.weight"]).bool()
        moved = (average.module[0].weight_blocks.detach() - start)[inside].mean()
        assert 0.008 < float(moved) < 0.01

    def test_a_write_past_autograd_can_be_followed_by_hand(self) -> None:
        model, masks = small()
        for blocks in masks.parameters():
            blocks.data.add_(1.0)
        masks.write_through()
        assert_invariant(model, masks)


class TestBase:
    def test_another_base_that_is_loaded_is_what_unload_restores(self) -> None:
        model, masks = small()
        masks.embed()
        base = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
        model.load_state_dict(base)
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(model.state_dict()[name], base[name]) for name in NAMES)

    def test_a_resumed_training_keeps_its_base(self) -> None:
        model, masks = small()
        base = {key: value.clone() for key, value in model.state_dict().items()}
        masks.embed()
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(checkpoint)
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(model.state_dict()[name], base[name]) for name in NAMES)

    def test_an_edited_base_is_not_restored_and_not_saved(self, tmp_path: Path) -> None:
        model, masks = small()
        masks.embed()
        with torch.no_grad():
            model[0]._parameters["weight"].mul_(2.0)
        with pytest.raises(EmbedError, match="changed in place"):
            sylva_compile.unload_adapter(model)
        with pytest.raises(EmbedError, match="changed in place"):
            sylva_compile.save_adapter(model, tmp_path / "adapter")
        assert_invariant(model, masks)
        sylva_compile.merge_and_unload(model)


class TestRefusals:
    """A request that cannot be met raises an error of one line and changes nothing."""

    def test_a_weight_of_another_shape_or_kind(self) -> None:
        model, masks = small()
        masks.embed()
        held = model[0]._parameters["weight"]
        for value in (nn.Parameter(torch.randn(16, 40)), None):
            with pytest.raises(EmbedError, match=r"\(50, 40\) only"):
                model[0].weight = value
        with pytest.raises(EmbedError, match="unload"):
            del model[0].weight
        assert model[0]._parameters["weight"] is held

    @pytest.mark.parametrize(
        "make", [lambda layer: nn.Parameter(layer.weight), parametrizations.weight_norm], ids=["itself", "weight_norm"]
    )
    def test_a_parameter_of_the_dense_weight(self, make: Callable[[nn.Module], Any]) -> None:
        model, masks = small()
        masks.embed()
        with pytest.raises(EmbedError, match=r"0\.weight carries blocks and cannot become another Parameter"):
            make(model[0])
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        assert_invariant(model, masks)

    def test_unembedding_a_class_made_from_an_embedded_one(self) -> None:
        model, masks = small()
        masks.embed()
        parametrize.register_parametrization(model[0], "bias", nn.Tanh())
        with pytest.raises(EmbedError, match="parametrization"):
            sylva_compile.unload_adapter(model)
        step(model, torch.optim.SGD(masks.parameters(), lr=1.0))
        assert_invariant(model, masks)

    def test_an_attribute_in_the_way(self) -> None:
        model, masks = small()
        model[2].weight_blocks = 3
        with pytest.raises(EmbedError, match="of its own"):
            masks.embed()
        assert type(model[0]) is nn.Linear
        assert model[0].weight.requires_grad

    def test_one_shared_weight_under_two_names(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        model[1].weight = model[0].weight
        masks = random_masks(model, ["0.weight", "1.weight"], 8, 0.5)
        with pytest.raises(EmbedError, match="one shared weight"):
            masks.embed()
        assert type(model[0]) is nn.Linear

    @pytest.mark.parametrize("name", ["0.weight", "0.weight_blocks"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_swapped_tensors(self, name: str, compiled: bool) -> None:
        model, masks = small()
        masks.embed()

        def call(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, tensors, (x,))

        if compiled:
            call = torch.compile(call, backend=sylva_compile.backend(masks, inner="aot_eager"))
        x = torch.randn(2, 40)
        call({}, x)
        with pytest.raises(EmbedError, match=r"0\.weight or its blocks were swapped .*functional_call"):
            call({name: (dict(model.named_parameters())[name].detach() + 1).requires_grad_()}, x)

    def test_another_dense_weight_without_gradients_is_what_it_is(self) -> None:
        model, masks = small()
        masks.embed()
        x, other = torch.randn(2, 40), torch.randn(50, 40)
        plain = copy.deepcopy(model)
        sylva_compile.merge_and_unload(plain)
        with torch.no_grad():
            plain[0].weight.copy_(other)
            found = torch.func.functional_call(model, {"0.weight": other}, (x,))
            assert torch.equal(found, plain(x))

    def test_a_module_that_cannot_change_its_class(self) -> None:
        class Keyed(nn.Linear):
            def __init_subclass__(cls, *, key: str, **rest: object) -> None:
                super().__init_subclass__(**rest)

        class Mine(Keyed, key="mine"):
            pass

        model, alive = nn.Sequential(nn.Linear(16, 16), Mine(16, 16)), set(live_states())
        masks = random_masks(model, ["0.weight", "1.weight"], 8, 0.5)
        for _ in range(2):
            with pytest.raises(EmbedError, match=r"A Mine cannot carry blocks in its weight \(.*key.*leave it out"):
                masks.embed()
            assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
            assert all(parameter.requires_grad for parameter in model.parameters())
            assert type(model[0]) is nn.Linear
        assert set(live_states()) <= alive

    def test_parameters_that_do_not_fit_are_refused_before_anything_changes(self) -> None:
        model, masks = small()
        masks.embed()
        held = model[0]._parameters["weight"]
        for value, message in (
            (torch.empty(50, 40, device="meta"), "on meta"),
            (torch.empty(50, 40, dtype=torch.float64), "torch.float64 on cpu"),
            (TwoTensor(torch.zeros(50, 40), torch.zeros(50, 40)), "TwoTensor"),
        ):
            with pytest.raises(EmbedError, match=message):
                model[0].weight = nn.Parameter(value)
            assert model[0]._parameters["weight"] is held
        assert_invariant(model, masks)


def test_a_gradient_from_before_does_not_move_the_frozen_part() -> None:
    model, masks = small()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(torch.randn(2, 40)).sum().backward()
    before = model[0].weight.detach().clone()
    masks.embed()
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_the_second_name_of_a_shared_weight_may_carry_the_mask() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    masks = random_masks(model, ["1.weight"], 8, 0.5)
    assert masks.parameters()[0] is model[1].weight_blocks
    masks.embed()


def test_layers_wrapped_by_torch_compile_keep_their_names(tmp_path: Path) -> None:
    base = nn.Sequential(small()[0], small()[0])
    model = copy.deepcopy(base)
    masks = random_masks(model, ["0.2.weight", "1.0.weight"], 8, 0.5)
    masks.embed()
    for index in (0, 1):
        model[index] = torch.compile(model[index], backend="eager")
    assert len(masks.parameters()) == 2
    sylva_compile.save_adapter(model, tmp_path)
    assert list(sylva_compile.load_adapter(base, tmp_path)) == ["0.2.weight", "1.0.weight"]


def test_states_die_with_their_model() -> None:
    model, masks = small()
    masks.embed()
    alive = [weakref.ref(state) for state in block_states(model).values()]
    assert {ref() for ref in alive} <= set(live_states())
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
weight = model[0]._parameters["weight"]
blocks = model.get_parameter("0.weight_blocks")
before = weight.clone()
blocks.grad = torch.ones_like(blocks)
torch.optim.SGD([blocks], lr=1.0).step()
print(bool((before != weight).any()), type(model[0]).__bases__[-1].__name__)
"""


def test_a_pickle_is_read_by_a_process_that_has_imported_nothing(tmp_path: Path) -> None:
    model, masks = small()
    masks.embed()
    torch.save(model, tmp_path / "model.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["True", "Linear"], run.stderr
    # Every name in the pickle must be that of a module which is there; a moved one would leave files unreadable.
    names = {argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)}
    ours = {name for name in names if name.startswith("sylva_compile.")}
    assert ours
    assert all(importlib.util.find_spec(name) is not None for name in ours)
