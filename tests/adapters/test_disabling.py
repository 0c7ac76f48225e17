"""Inside of `disable_adapter` a model is its base bit for bit; afterwards it is as before, and training goes on."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_masks
from torch import nn

import sylva_compile
from sylva_compile import BlockMask, Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import AdapterError, EmbedError, SylvaError
from sylva_compile.kernels.blocks import BlockCopier

NAMES = ["0.weight", "2.weight"]
DTYPES = [torch.float32, torch.bfloat16]


def small(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential, Masks]:
    """Return a base, the same model with blocks that reach over its edges, and the masks."""
    base = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30)).to(dtype).requires_grad_(False)
    model = copy.deepcopy(base)
    masks = random_masks(model, NAMES, 16, 0.5)
    masks.embed()
    return base, model, masks


def train(model: Any, masks: Masks, dtype: torch.dtype = torch.float32, rule: Any = sylva_compile.AdamW) -> None:
    optimizer = rule(masks.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.randn(6, 40, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def elsewhere(masks: Masks) -> dict[str, BlockMask]:
    """Choose as many blocks as before, at other places."""
    maps = {name: mask.block_map() for name, mask in masks.items()}
    return {name: BlockMask.from_block_map(maps[name].flip(0, 1), masks[name].shape, 16) for name in masks}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy everything: dense weights and blocks."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    return found | {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_now(model: nn.Module, then: dict[str, torch.Tensor]) -> bool:
    now = values(model)
    return list(now) == list(then) and all(torch.equal(now[name], value) for name, value in then.items())


def is_base(model: nn.Module, base: nn.Module) -> bool:
    return all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())


class TestValues:
    @settings(max_examples=12, deadline=None)
    @given(
        dtype=st.sampled_from(DTYPES),
        moves=st.integers(0, 2),
        mode=st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]),
        rule=st.sampled_from([sylva_compile.AdamW, torch.optim.AdamW]),
    )
    def test_are_the_bases_inside_and_the_trained_ones_outside(
        self, dtype: torch.dtype, moves: int, mode: Any, rule: Any
    ) -> None:
        base, model, masks = small(dtype)
        train(model, masks, dtype, rule)
        for _ in range(moves):
            masks.move(elsewhere(masks))
            train(model, masks, dtype, rule)
        then, x = values(model), torch.randn(6, 40, dtype=dtype)
        trained = model(x)
        for _ in range(2):
            with mode(), sylva_compile.disable_adapter(model):
                assert is_base(model, base)
                assert torch.equal(model(x), base(x))
            assert is_now(model, then)
            assert torch.equal(model(x), trained)
        train(model, masks, dtype, rule)
        assert not is_now(model, then)
        sylva_compile.unload_adapter(model)
        assert is_base(model, base)

    def test_come_back_after_an_error(self) -> None:
        base, model, masks = small()
        train(model, masks)
        then = values(model)

        @sylva_compile.disable_adapter(model)
        def fail() -> None:
            assert is_base(model, base)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert is_now(model, then)

    def test_come_back_where_an_entry_fails_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, model, masks = small()
        train(model, masks)
        then = values(model)
        write, calls = BlockCopier.write, []

        def fail_once(copier: BlockCopier, blocks: torch.Tensor) -> None:
            write(copier, blocks)
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError

        monkeypatch.setattr(BlockCopier, "write", fail_once)
        with pytest.raises(MemoryError), sylva_compile.disable_adapter(model):
            pass
        assert is_now(model, then)
        train(model, masks)

    def test_of_a_shared_and_of_a_transposed_weight(self) -> None:
        from transformers.pytorch_utils import Conv1D

        base = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), Conv1D(40, 24)).requires_grad_(False)
        base[1].weight = base[0].weight
        model = copy.deepcopy(base)
        masks = random_masks(model, ["0.weight", "2.weight"], 16, 0.6)
        optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
        model(torch.randn(5, 24)).square().mean().backward()
        optimizer.step()
        then = values(model)
        with sylva_compile.disable_adapter(model):
            assert is_base(model, base)
        assert is_now(model, then)

    def test_of_a_head_that_an_adapter_replaced(self, tmp_path: Path) -> None:
        base, model, masks = small()
        train(model, masks)
        with torch.no_grad():
            model[2].bias.add_(1)
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["2"])
        fresh = copy.deepcopy(base)
        sylva_compile.load_adapter(fresh, tmp_path)
        then = values(fresh)
        with sylva_compile.disable_adapter(fresh):
            assert is_base(fresh, base)
        assert is_now(fresh, then)

    def test_of_running_statistics_that_an_adapter_replaced(self, tmp_path: Path) -> None:
        base = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).requires_grad_(False)
        model = copy.deepcopy(base)
        random_masks(model, ["0.weight"], 8, 0.5).embed()
        model(torch.randn(8, 16))
        sylva_compile.save_adapter(model, tmp_path, modules_to_save=["1"])
        sylva_compile.load_adapter(base, tmp_path)
        then = values(base)
        with sylva_compile.disable_adapter(base):
            assert not base[1].running_mean.any()
            base(torch.randn(8, 16))
        assert is_now(base, then)

    def test_of_an_edit_of_the_blocks_before(self) -> None:
        base, model, masks = small()
        with torch.no_grad():
            masks.parameters()[0].add_(1)
        with sylva_compile.disable_adapter(model):
            assert is_base(model, base)
        assert not is_base(model, base)


class TestBackward:
    def run(self, model: nn.Sequential, masks: Masks, compiled: bool) -> Any:
        return torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager")) if compiled else model

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_graph_from_before_is_right_afterwards(self, compiled: bool) -> None:
        """The order of DPO: the model, then its reference, then the loss of both."""
        base, model, masks = small()
        train(model, masks)
        run, x = self.run(model, masks, compiled), torch.randn(6, 40)
        run(x).square().mean().backward()
        expected = [blocks.grad for blocks in masks.parameters()]
        for blocks in masks.parameters():
            blocks.grad = None
        output = run(x)
        with torch.no_grad(), sylva_compile.disable_adapter(model):
            torch.testing.assert_close(run(x), base(x))
        output.square().mean().backward()
        for blocks, gradient in zip(masks.parameters(), expected, strict=True):
            assert gradient is not None and gradient.any()
            assert blocks.grad is not None and torch.equal(blocks.grad, gradient)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_one_pass_inside_and_one_outside_is_refused(self, compiled: bool) -> None:
        _, model, masks = small()
        train(model, masks)
        run, x = self.run(model, masks, compiled), torch.randn(6, 40)
        before = run(x).square().mean()
        with sylva_compile.disable_adapter(model):
            with pytest.raises((EmbedError, RuntimeError), match=r"inside of disable_adapter|modified"):
                before.backward()
            inside = run(x).square().mean()
        with pytest.raises((EmbedError, RuntimeError), match=r"inside of disable_adapter|modified"):
            inside.backward()
        train(model, masks)

    def test_each_result_of_a_graph_is_refused(self) -> None:
        """A view of a result leads to the graph's backward pass through a node of its own."""
        model = nn.Linear(32, 32).requires_grad_(False)
        masks = random_masks(model, ["weight"], 16, 0.5)

        @torch.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = model(x)
            return y.view(-1), y

        with sylva_compile.disable_adapter(model):
            inside = run(torch.randn(6, 32))
        for output in inside:
            with pytest.raises(EmbedError, match="inside of disable_adapter"):
                output.square().sum().backward(retain_graph=True)

    def test_autograd_never_takes_one_time_for_another(self) -> None:
        """A weight that others read: its count of writes inside is none that training reaches."""
        _, model, masks = small()
        weight = block_states(model)["2.weight"].weight
        x = torch.randn(3, 50, requires_grad=True)
        for _ in range(3):
            with sylva_compile.disable_adapter(model):
                inside = nn.functional.linear(x, weight).sum()
            for _ in range(3):
                with pytest.raises(RuntimeError, match="inplace operation"):
                    inside.backward()
                train(model, masks)
            with sylva_compile.disable_adapter(model), pytest.raises(RuntimeError, match="inplace operation"):
                inside.backward()

    def test_pending_gradients_stay(self) -> None:
        _, model, masks = small()
        model(torch.randn(6, 40)).square().mean().backward()
        then = [blocks.grad.clone() for blocks in masks.parameters() if blocks.grad is not None]
        with sylva_compile.disable_adapter(model):
            pass
        assert len(then) == 2
        assert all(torch.equal(a, b.grad) for a, b in zip(then, masks.parameters(), strict=True) if b.grad is not None)

    def test_nothing_is_compiled_again(self) -> None:
        base, model, masks = small()
        backend = sylva_compile.backend(masks, inner="aot_eager")
        compiled: list[int] = []

        def counted(gm: Any, inputs: Any, **kwargs: Any) -> Any:
            compiled.append(1)
            return backend(gm, inputs, **kwargs)

        run, x = torch.compile(model, backend=counted), torch.randn(6, 40)
        optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
        for step in range(4):
            run(x).square().mean().backward()
            with torch.no_grad(), sylva_compile.disable_adapter(model):
                torch.testing.assert_close(run(x), base(x))
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                first = len(compiled)
        assert len(compiled) == first


class TestRefused:
    def test_inside(self, tmp_path: Path) -> None:
        base, model, masks = small()
        train(model, masks)
        sylva_compile.save_adapter(model, tmp_path / "before")
        then = values(model)
        optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
        loaded = {name: value.clone() for name, value in model.state_dict().items()}
        attempts: dict[str, Any] = {
            "step": optimizer.step,
            "own step": sylva_compile.AdamW(masks.parameters(), lr=0.1).step,
            "move": lambda: masks.move(elsewhere(masks)),
            "save": lambda: sylva_compile.save_adapter(model, tmp_path / "inside"),
            "load": lambda: sylva_compile.load_adapter(model, tmp_path / "before"),
            "unload": lambda: sylva_compile.unload_adapter(model),
            "merge": lambda: sylva_compile.merge_and_unload(model),
            "print": lambda: sylva_compile.print_trainable_parameters(model),
            "write": masks.write_through,
            "state dict": lambda: model.load_state_dict(loaded),
            "to": lambda: model.to(torch.float64),
            "copy": lambda: copy.deepcopy(model),
            "pickle": lambda: pickle.dumps(model),
            "assign": lambda: setattr(model[0], "weight", nn.Parameter(torch.zeros(50, 40))),
        }
        with sylva_compile.disable_adapter(model):
            for name, attempt in attempts.items():
                with pytest.raises(SylvaError, match=r"inside of disable_adapter") as caught:
                    attempt()
                assert "\n" not in str(caught.value), name
                assert is_base(model, base), name
            with pytest.raises(EmbedError, match="disabled already"), sylva_compile.disable_adapter(model):
                pass
            assert is_base(model, base)
        assert is_now(model, then)
        assert not (tmp_path / "inside").exists()

    def test_another_models_optimizer_is_free(self) -> None:
        _, model, _ = small()
        _, other, masks = small()
        with sylva_compile.disable_adapter(model):
            train(other, masks)

    def test_an_edit_of_a_weight_inside(self) -> None:
        _, model, masks = small()
        train(model, masks)
        then = values(model)
        weight = block_states(model)["0.weight"].weight

        @sylva_compile.disable_adapter(model)
        def edit() -> None:
            with torch.no_grad():
                weight.mul_(1)
            with pytest.raises(EmbedError, match="inside of disable_adapter"):
                model(torch.randn(6, 40))

        with pytest.raises(EmbedError, match=r"0\.weight was changed inside"):
            edit()
        assert is_now(model, then)
        with pytest.raises(EmbedError, match="its base is not known"), sylva_compile.disable_adapter(model):
            pass

    def test_an_edit_of_blocks_inside_waits(self) -> None:
        base, model, masks = small()
        with sylva_compile.disable_adapter(model):
            with torch.no_grad():
                masks.parameters()[0].add_(1)
            with pytest.raises(EmbedError, match="inside of disable_adapter"):
                model(torch.randn(6, 40))
        assert not is_base(model, base)

    def test_an_unknown_base(self) -> None:
        _, model, masks = small()
        train(model, masks)
        with torch.no_grad():
            block_states(model)["2.weight"].weight[0, 0] += 1
        then = values(model)
        with pytest.raises(EmbedError, match="its base is not known"), sylva_compile.disable_adapter(model):
            pass
        assert is_now(model, then)

    def test_a_model_without_blocks(self) -> None:
        """After `merge_and_unload` the trained values are all that is left: silence would pass them off as the base."""
        _, model, _ = small()
        sylva_compile.merge_and_unload(model)
        with pytest.raises(AdapterError, match="carries no trained blocks"), sylva_compile.disable_adapter(model):
            pass
