"""After every step, dense weights equal the rounded blocks, and are unchanged outside of the blocks."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_invariant, random_masks
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.kernels.blocks import BlockWriter
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.optim import SGD, AdamW, Lion, launches


class Weights(nn.Module):
    """A module with matrices as parameters and no layers."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"w{number}", nn.Parameter(weight))


def matrix(shape: tuple[int, int], layout: str, dtype: torch.dtype) -> Tensor:
    m, n = shape
    if layout == "transposed":
        return torch.randn(n, m).to(dtype).t()
    if layout == "sliced":
        return torch.randn(2 * m, 3 * n).to(dtype)[::2, 1::3]
    return torch.randn(m, n).to(dtype)


def embedded(weights: list[Tensor], block_size: int = 8) -> tuple[Weights, Masks]:
    model = Weights(weights)
    masks = random_masks(model, [name for name, _ in model.named_parameters()], block_size, 0.5)
    masks.embed()
    return model, masks


def give_gradients(masks: Masks) -> None:
    for blocks in masks.parameters():
        blocks.grad = torch.randn_like(blocks)


def outside(model: nn.Module, masks: Masks) -> list[Tensor]:
    return [model.get_parameter(name).detach()[~mask.dense()].clone() for name, mask in masks.items()]


def no_write(*_: Any) -> None:
    raise AssertionError("the kernel has written through; nobody need do it again")


class TestEveryStep:
    @settings(max_examples=40, deadline=None)
    @given(
        shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=3),
        layouts=st.lists(st.sampled_from(["plain", "transposed", "sliced"]), min_size=3, max_size=3),
        dtypes=st.lists(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), min_size=3, max_size=3
        ),
        block_size=st.sampled_from([8, 11, 32, 64]),
        seed=st.integers(0, 1000),
    )
    def test_bit_for_bit(
        self,
        shapes: list[tuple[int, int]],
        layouts: list[str],
        dtypes: list[torch.dtype],
        block_size: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        weights = [matrix(*one) for one in zip(shapes, layouts, dtypes, strict=False)]
        if all(size < block_size for shape in shapes for size in shape):
            block_size = 8
            weights.append(torch.randn(8, 8))
        model, masks = embedded(weights, block_size)
        kept = outside(model, masks)
        extra = nn.Parameter(torch.randn(33))
        optimizer = AdamW([*masks.parameters(), extra], lr=0.1)
        for _ in range(3):
            give_gradients(masks)
            extra.grad = torch.randn(33)
            before = [blocks.detach().clone() for blocks in masks.parameters()]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(BlockWriter, "write", no_write)
                optimizer.step()
            assert_invariant(model, masks)
            for blocks, old in zip(masks.parameters(), before, strict=True):
                assert not blocks.numel() or not torch.equal(blocks, old)
        for now, then in zip(outside(model, masks), kept, strict=True):
            assert torch.equal(now, then)

    @pytest.mark.parametrize("block_size", [8, 200])
    def test_over_the_edge_nothing_is_trained(self, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        for eager in (False, True):
            if eager:
                monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
            model, masks = embedded([torch.randn(13, 203)], block_size)
            masks = Masks(masks, model=model)
            optimizer = SGD(masks.parameters(), lr=0.1, momentum=0.9)
            for _ in range(2):
                # A backward pass gives zero gradients outside of the weight; these random gradients are not zero there.
                give_gradients(masks)
                optimizer.step()
            (state,) = block_states(model).values()
            assert torch.equal(state.zero_outside(state.blocks.detach()), state.blocks.detach())
            assert_invariant(model, masks)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_whole_cache_lines_and_parts_of_them_are_written_alike(self, dtype: torch.dtype) -> None:
        ends = []
        for start in (0, 1):
            torch.manual_seed(0)
            values = torch.randn(96, 128).to(dtype)
            # torch's memory begins at a cache line; with an offset of one element, every row ends inside a cache line.
            memory = torch.zeros(1 + values.numel(), dtype=dtype)
            weight = memory[start:][: values.numel()].view(96, 128).copy_(values)
            assert (weight.data_ptr() % 64 == 0) == (start == 0)
            model, masks = embedded([weight], 64)
            kept = outside(model, masks)
            optimizer = AdamW(masks.parameters(), lr=0.1)
            for _ in range(2):
                give_gradients(masks)
                optimizer.step()
            assert_invariant(model, masks)
            assert all(torch.equal(*pair) for pair in zip(outside(model, masks), kept, strict=True))
            assert not torch.equal(weight, values)
            ends.append(weight.clone())
        assert torch.equal(*ends)

    def test_is_what_torch_and_the_hook_do(self) -> None:
        model, masks = embedded([torch.randn(40, 48).bfloat16(), torch.randn(24, 16)])
        twin = copy.deepcopy(model)
        bound = Masks(masks, model=twin)
        ours = AdamW(masks.parameters(), lr=0.1, weight_decay=0.1)
        theirs = torch.optim.AdamW(bound.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(5):
            give_gradients(masks)
            for mine, other in zip(masks.parameters(), bound.parameters(), strict=True):
                other.grad = mine.grad
            ours.step()
            theirs.step()
        for mine, other in zip(masks.parameters(), bound.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)

    def test_missing_gradients_leave_a_weight_alone(self) -> None:
        model, masks = embedded([torch.randn(40, 50), torch.randn(24, 16)])
        optimizer = AdamW(masks.parameters(), lr=0.1)
        give_gradients(masks)
        optimizer.step()
        kept, version = model.w1.detach().clone(), model.w1._version
        masks.parameters()[1].grad = None
        optimizer.step()
        assert torch.equal(model.w1, kept)
        assert model.w1._version == version
        assert_invariant(model, masks)

    @pytest.mark.parametrize("answer", ["skip", "ignore"])
    def test_skipped_steps_leave_weights_alone(self, answer: Any) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        give_gradients(masks)
        masks.parameters()[0].grad[0, 0, 0] = torch.nan
        kept = model.w0.detach().clone()
        AdamW(masks.parameters(), nonfinite=answer).step()
        assert torch.equal(model.w0, kept) == (answer == "skip")


class TestOthersWriteToo:
    """Edits by hand, other optimizers, moves and replaced tensors between steps of the fused optimizer."""

    def train(self, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
        give_gradients(masks)
        optimizer.step()

    def test_edits_by_hand_between_steps(self) -> None:
        model, masks = embedded([torch.randn(40, 50).bfloat16()])
        optimizer = Lion(masks.parameters(), lr=0.0)
        self.train(masks, optimizer)
        with torch.no_grad():
            model._parameters["w0"].mul_(2.0)
        wanted = model._parameters["w0"].detach().clone()
        self.train(masks, optimizer)
        assert torch.equal(model.w0, wanted)
        with torch.no_grad():
            masks.parameters()[0].add_(0.25)
        self.train(masks, optimizer)
        assert_invariant(model, masks)

    def test_edits_in_the_closure(self) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        optimizer = SGD(masks.parameters(), lr=0.0)

        def closure() -> float:
            with torch.no_grad():
                model._parameters["w0"].mul_(2.0)
            give_gradients(masks)
            return 0.0

        wanted = 2.0 * model.w0.detach()
        optimizer.step(closure)
        assert torch.equal(model.w0, wanted)
        assert_invariant(model, masks)

    def test_another_optimizer_in_turns(self) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        for _ in range(2):
            for optimizer in (AdamW(masks.parameters()), torch.optim.SGD(masks.parameters(), lr=0.1)):
                self.train(masks, optimizer)
                assert_invariant(model, masks)

    def test_a_subclass_that_writes_past_the_kernel(self) -> None:
        class Nudged(AdamW):
            def step(self, closure: Any = None) -> None:
                super().step(closure)
                with torch.no_grad():
                    for parameter in self.param_groups[0]["params"]:
                        parameter.add_(0.5)

        model, masks = embedded([torch.randn(40, 50)])
        self.train(masks, Nudged(masks.parameters()))
        assert_invariant(model, masks)

    @pytest.mark.parametrize("how", ["to", "assign", "load", "blocks.data", "weight.data"])
    def test_tensors_replaced_between_steps(self, how: str) -> None:
        model, masks = embedded([torch.randn(40, 50), torch.randn(24, 16)])
        optimizer = AdamW(masks.parameters(), lr=0.1)
        self.train(masks, optimizer)
        if how == "to":
            model.bfloat16()
        elif how == "assign":
            model.w0 = nn.Parameter(torch.randn(40, 50))
        elif how == "load":
            model.load_state_dict({"w0": torch.randn(40, 50), "w1": torch.randn(24, 16)}, assign=True)
        elif how == "blocks.data":
            masks.parameters()[0].data = masks.parameters()[0].data.clone()
        else:
            model._parameters["w0"].data = model._parameters["w0"].data.t().contiguous().t()
        old = model._parameters["w0"].detach().clone()
        self.train(masks, optimizer)
        assert_invariant(model, masks)
        assert not torch.equal(model._parameters["w0"], old)

    def test_blocks_that_no_longer_lie_dense(self) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        blocks = masks.parameters()[0]
        blocks.data = torch.randn(2 * len(blocks), 8, 8)[::2]
        optimizer = AdamW(masks.parameters(), lr=0.1)
        self.train(masks, optimizer)
        assert_invariant(model, masks)

    def test_a_weight_that_two_modules_share(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
        model[1].weight = model[0].weight
        masks = random_masks(model, ["0.weight"], 8, 0.5)
        masks.embed()
        self.train(masks, AdamW(masks.parameters(), lr=0.1))
        assert_invariant(model, masks)
        assert model[1]._parameters["weight"] is model[0]._parameters["weight"]

    def test_blocks_of_two_models_in_one_optimizer(self) -> None:
        both = [embedded([torch.randn(40, 50)]), embedded([torch.randn(24, 16).half()])]
        optimizer = AdamW([blocks for _, masks in both for blocks in masks.parameters()], lr=0.1)
        for _ in range(2):
            for _, masks in both:
                give_gradients(masks)
            optimizer.step()
            for model, masks in both:
                assert_invariant(model, masks)

    @pytest.mark.parametrize("leave", [sylva_compile.merge_and_unload, sylva_compile.unload_adapter])
    def test_blocks_taken_out_in_between(self, leave: Any) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        optimizer = AdamW(masks.parameters(), lr=0.1)
        held = masks.parameters()
        self.train(masks, optimizer)
        leave(model)
        kept = model.w0.detach().clone()
        held[0].grad = torch.randn_like(held[0])
        optimizer.step()
        assert torch.equal(model.w0, kept)

    def test_a_copy_of_model_and_optimizer_goes_its_own_way(self) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        optimizer = AdamW(masks.parameters(), lr=0.1)
        self.train(masks, optimizer)
        kept = model.w0.detach().clone()
        twin, copied = copy.deepcopy((model, optimizer))
        bound = Masks(masks, model=twin)
        assert copied.param_groups[0]["params"][0] is bound.parameters()[0]
        self.train(bound, copied)
        assert_invariant(twin, masks)
        assert torch.equal(model.w0, kept)
        assert not torch.equal(twin.w0, kept)

    def test_no_kernel_keeps_a_model_alive(self) -> None:
        model, masks = embedded([torch.randn(40, 50)])
        optimizer = AdamW(masks.parameters())
        self.train(masks, optimizer)
        weight = weakref.ref(model._parameters["w0"])
        del model
        gc.collect()
        assert weight() is None
