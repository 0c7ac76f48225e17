"""Blocks move while training goes on: gradients, dense weights, optimizer states and files follow."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_invariant, blocks_by_loops, random_masks
from tiny_models import tiny
from torch import nn

import sylva_compile
from sylva_compile import BlockMask, Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.errors import ArgumentError, EmbedError, MaskError

NAMES = ["0.weight", "2.weight"]


def small(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Masks]:
    # No width is a multiple of 16, so blocks reach over every edge.
    model = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30)).to(dtype).requires_grad_(False)
    return model, random_masks(model, NAMES, 16, 0.5)


def elsewhere(masks: Masks, seed: int) -> dict[str, BlockMask]:
    """Choose as many blocks as before at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, mask in masks.items():
        block_map = mask.block_map()
        order = torch.randperm(block_map.numel(), generator=generator)
        block_map = block_map.flatten()[order].view(block_map.shape)
        chosen[name] = BlockMask.from_block_map(block_map, mask.shape, mask.block_size)
    return chosen


def backward(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(6, 40, dtype=dtype)
    model(x).square().mean().backward()
    return x


class TestMove:
    @settings(max_examples=15, deadline=None)
    @given(
        seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
        compiled=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        rule=st.sampled_from([sylva_compile.AdamW, sylva_compile.optim.Muon, torch.optim.AdamW]),
    )
    def test_training_goes_on_right_after_any_moves(
        self, seeds: list[int], compiled: bool, dtype: torch.dtype, rule: Any, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        torch._dynamo.reset()
        torch.manual_seed(seeds[0])
        model, masks = small(dtype)
        base = copy.deepcopy(model)
        trained = {name: masks[name].dense() for name in NAMES}
        masks.embed()
        run = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager")) if compiled else model
        optimizer = rule(masks.parameters(), lr=0.02)
        for seed in seeds:
            for _ in range(2):
                plain = copy.deepcopy(base)
                plain.load_state_dict(model.state_dict())
                x = backward(run, dtype)
                plain.requires_grad_(True)(x).square().mean().backward()
                for name, state in block_states(model).items():
                    dense = plain.get_parameter(name).grad
                    assert dense is not None and dense.any()
                    expected = blocks_by_loops(dense, state.mask).to(state.blocks.dtype)
                    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                    torch.testing.assert_close(
                        state.blocks.grad, expected, rtol=tolerance, atol=tolerance * float(dense.abs().max())
                    )
                optimizer.step()
                optimizer.zero_grad()
                assert_invariant(model, masks)
            masks.move(elsewhere(masks, seed))
            trained = {name: trained[name] | masks[name].dense() for name in NAMES}
            assert_invariant(model, masks)
        for name in NAMES:
            same = model.get_parameter(name) == base.get_parameter(name)
            assert bool((same | trained[name]).all())
        directory = tmp_path_factory.mktemp("adapter")
        sylva_compile.save_adapter(model, directory)
        state_dict = copy.deepcopy(model.state_dict())
        fresh = copy.deepcopy(base)
        loaded = sylva_compile.load_adapter(fresh, directory)
        assert dict(loaded) == dict(masks)
        for mine, its in zip(masks.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(mine, its)
        for twin in (model, fresh):
            assert all(torch.equal(value, state_dict[name]) for name, value in twin.state_dict().items())
            sylva_compile.unload_adapter(twin)
            assert all(torch.equal(value, twin.state_dict()[name]) for name, value in base.state_dict().items())

    def test_blocks_that_stay_keep_their_low_bits(self) -> None:
        model, masks = small(torch.bfloat16)
        blocks = masks.parameters()[0]
        with torch.no_grad():
            blocks.copy_(torch.randn_like(blocks))
        before = blocks.detach().clone()
        stays = masks["0.weight"].block_map()
        away, free = stays.flatten().nonzero()[0], (~stays).flatten().nonzero()[0]
        stays.view(-1)[away], stays.view(-1)[free] = False, True
        masks.move({"0.weight": BlockMask.from_block_map(stays, (50, 40), 16)})
        kept = [row for row in before.flatten(1) if (row == blocks.flatten(1)).all(1).any()]
        assert len(kept) == len(before) - 1
        assert_invariant(model, masks)

    def test_an_adapter_replaces_what_another_training_of_the_base_left_behind(self, tmp_path: Path) -> None:
        model, masks = small()
        masks.embed()
        sylva_compile.save_adapter(model, tmp_path)
        expected = copy.deepcopy(model.state_dict())
        home = dict(masks)
        for seed in (1, 2):
            with torch.no_grad():
                for blocks in masks.parameters():
                    blocks.add_(1.0)
            masks.move(elsewhere(masks, seed))
        masks.move(home)
        sylva_compile.load_adapter(model, tmp_path)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    def test_a_state_dict_of_the_same_training_is_no_new_base(self, caplog: pytest.LogCaptureFixture) -> None:
        model, masks = small()
        base = copy.deepcopy(model.state_dict())
        masks.embed()
        with torch.no_grad():
            masks.parameters()[0].add_(1.0)
        masks.move(elsewhere(masks, 3))
        later = copy.deepcopy(model.state_dict())
        model.load_state_dict(base)
        model.load_state_dict(later)
        assert "differ from the base" not in caplog.text
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())

    def test_stochastic_rounding_of_what_leaves_has_the_right_mean(self) -> None:
        model = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
        corner = torch.zeros(4, 4, dtype=torch.bool)
        corner[0, 0] = True
        masks = Masks.from_block_maps(model, {"0.weight": corner}, 64)
        value = 1.0 + 1 / 1024  # An eighth of the way to the next bfloat16, 1 + 1 / 128.
        with torch.no_grad():
            masks.parameters()[0].fill_(value)
        other = BlockMask.from_block_map(corner.flip(0), (256, 256), 64)
        masks.move({"0.weight": other}, generator=torch.Generator().manual_seed(0))
        left = model[0].weight.detach()[:64, :64].float()
        assert set(left.unique().tolist()) == {1.0, 1.0 + 1 / 128}
        assert abs(float(left.mean()) - value) < 4 * (1 / 128) / 3 / 64

    def test_optimizer_states_start_new(self) -> None:
        for rule in (sylva_compile.AdamW, torch.optim.AdamW):
            model, masks = small()
            optimizer = rule(masks.parameters(), lr=1e-3)
            for _ in range(50):
                backward(model)
                optimizer.step()
                optimizer.zero_grad()
            masks.move(elsewhere(masks, 5))
            before = [blocks.detach().clone() for blocks in masks.parameters()]
            backward(model)
            optimizer.step()
            for old, new in zip(before, masks.parameters(), strict=True):
                # Adam's first step has the size of the learning rate; with an old count it would be 2.5 times that.
                assert float((new.detach() - old).abs().max()) < 1.01e-3

    def test_every_optimizer_of_the_blocks_starts_new(self) -> None:
        model, masks = small()
        optimizers = [sylva_compile.AdamW(masks.parameters()), torch.optim.AdamW(masks.parameters())]
        for optimizer in optimizers:
            backward(model)
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        masks.move(elsewhere(masks, 5))
        assert not any(value.any() for each in optimizers[0].state.values() for value in each.values())
        assert not optimizers[1].state

    def test_an_edit_where_blocks_have_been_everywhere_leaves_the_base(self, caplog: pytest.LogCaptureFixture) -> None:
        model, masks = small()
        base = copy.deepcopy(model.state_dict())
        masks.embed()
        for name, state in block_states(model).items():
            every = BlockMask.from_block_map(torch.ones_like(masks[name].block_map()), masks[name].shape, 16)
            state.originals.add(state.weight, every.positions)
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        model.load_state_dict({name: value.mul(2) if name in masks else value for name, value in base.items()})
        assert "have been everywhere" in caplog.text
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


class TestCompiled:
    def test_nothing_is_compiled_again_in_a_model_compiled_whole(self) -> None:
        torch._dynamo.reset()
        case = tiny("llama")
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        masks.embed()
        layouts = [state.layout for state in block_states(case.model).values()]
        for layout in layouts:
            layout.reserve(8)
        update_input_channels(layouts)
        compiled = torch.compile(case.model, backend=sylva_compile.backend(masks, inner="aot_eager"))
        compiled(**case.batch).loss.backward()
        torch._dynamo.utils.counters.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in range(6):
                case.model.zero_grad()
                masks.move(elsewhere(masks, seed))
                compiled(**case.batch).loss.backward()
        assert not torch._dynamo.utils.counters["stats"]

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_move_before_the_backward_pass_is_refused_there(self, compiled: bool) -> None:
        torch._dynamo.reset()
        model, masks = small()
        masks.embed()
        run = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager")) if compiled else model
        loss = run(torch.randn(6, 40)).square().mean()
        masks.move(elsewhere(masks, 1))
        with pytest.raises(EmbedError, match="between a forward pass and its backward pass"):
            loss.backward()
        backward(run)


class TestRefused:
    def test_errors_leave_everything_as_it_was(self) -> None:
        model, masks = small()
        with pytest.raises(EmbedError, match="does not carry"):
            masks.move(elsewhere(masks, 0))
        optimizer = sylva_compile.AdamW(masks.parameters())
        foreign = torch.optim.AdamW(masks.parameters())
        before = (dict(masks), copy.deepcopy(model.state_dict()))
        new = elsewhere(masks, 0)
        fewer = new["2.weight"].block_map()
        fewer.view(-1)[fewer.flatten().nonzero()[0]] = False
        wrong: Any
        for wrong, message in (
            ({**new, "2.weight": BlockMask.from_block_map(fewer, (30, 50), 16)}, "their number and size stay"),
            ({**new, "4.weight": new["2.weight"]}, "no weight '4.weight'"),
        ):
            with pytest.raises(MaskError, match=message):
                masks.move(wrong)
        with pytest.raises(ArgumentError, match="use carry='none'"):
            masks.move(new, optimizer=foreign, carry="intersection")
        with pytest.raises(ArgumentError, match="use 'none' or 'intersection'"):
            masks.move(new, optimizer=optimizer, carry="all")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="does not step the blocks"):
            masks.move(new, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))]))
        backward(model)
        with pytest.raises(EmbedError, match="zero_grad"):
            masks.move(new)
        optimizer.zero_grad()
        assert dict(masks) == before[0]
        assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
        masks.move(new, optimizer=optimizer)
        with pytest.raises(EmbedError, match="does not carry"):
            Masks(before[0], model=model).move(elsewhere(masks, 1))

    def test_inference_mode(self) -> None:
        _, masks = small()
        masks.embed()
        with torch.inference_mode(), pytest.raises(EmbedError, match="inference_mode"):
            masks.move(elsewhere(masks, 0))

    def test_unbound_masks(self) -> None:
        _, masks = small()
        with pytest.raises(MaskError, match="not bound"):
            Masks(masks).move({})

    def test_ranks_that_move_differently(self, tmp_path: Path) -> None:
        assert two_ranks.run("move_two_ranks.py", tmp_path) == ["refused\nrefused\nmoved\n"] * 2
