"""Adapters, moves, merging and the base of models with quantised weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import ALL, formats, mlp, needs_bitsandbytes, packed_bytes, quiet
from quantised_twin import B, assert_close, expected, masks_of, passed, shake
from torch import nn

import sylva_compile
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.errors import AdapterError, ArgumentError, EmbedError, ScopeError
from sylva_compile.integrations.distributed_checkpoint import blocks_state
from sylva_compile.optim import SGD, AdamW
from sylva_compile.schedules import LayerSchedule, MovingBlocks

pytestmark = quiet


def moved(masks: Masks, seed: int) -> dict[str, BlockMask]:
    """Return other places for as many blocks."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in masks.items():
        chosen = torch.zeros_like(mask.block_map()).flatten()
        chosen[torch.randperm(chosen.numel(), generator=generator)[: mask.nnz]] = True
        found[name] = BlockMask.from_block_map(chosen.view(mask.block_map().shape), mask.shape, mask.block_size)
    return found


def train(model: Any, masks: Masks, optimizer: torch.optim.Optimizer, steps: int = 2, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", formats())
def test_save_load_resume(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    base, packed = copy.deepcopy(model), packed_bytes(model)
    masks = masks_of(model)
    optimizer = SGD(masks.parameters(), lr=0.1)
    train(model, masks, optimizer)
    sylva_compile.save_adapter(model, tmp_path)
    x = torch.randn(8, 32)
    wanted = model(x).detach()
    loaded = sylva_compile.load_adapter(base, tmp_path)
    assert torch.equal(base(x), wanted)
    train(model, masks, optimizer, seed=4)
    train(base, loaded, SGD(loaded.parameters(), lr=0.1), seed=4)
    assert torch.equal(base(x), model(x))
    sylva_compile.unload_adapter(base)
    assert packed_bytes(base) == packed


@needs_bitsandbytes
def test_an_adapter_belongs_to_its_packed_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    dense = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48))
    shake(masks_of(model))
    sylva_compile.save_adapter(model, tmp_path / "nf4")
    with pytest.raises(AdapterError, match=r"made for 0.weight \[64, 32\] bitsandbytes-4bit type=nf4.* float32 here"):
        sylva_compile.load_adapter(dense, tmp_path / "nf4")
    maps = {name: masks.block_map() for name, masks in masks_of(mlp("nf4")).items()}
    Masks.from_block_maps(dense, maps, B).embed(dense)
    sylva_compile.save_adapter(dense, tmp_path / "dense")
    with pytest.raises(AdapterError, match=r"float32, which is \[64, 32\] bitsandbytes-4bit .* here"):
        sylva_compile.load_adapter(mlp("nf4"), tmp_path / "dense")
    with pytest.raises(AdapterError, match="trained on another base"):
        sylva_compile.load_adapter(mlp("nf4"), tmp_path / "nf4")
    with pytest.raises(AdapterError, match=r"type=fp4"):
        sylva_compile.load_adapter(mlp("fp4"), tmp_path / "nf4")


@pytest.mark.parametrize("kind", formats("nf4", "int8", "torchao-int8"))
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_moves_keep_what_blocks_have_learnt(kind: str, inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    packed = packed_bytes(model)
    masks = masks_of(model)
    masks.embed(model)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    run: Any = model if inner is None else torch.compile(model, backend=backend, fullgraph=True)
    optimizer = AdamW(masks.parameters(), lr=1e-2)
    x = torch.randn(8, 32)
    for turn in range(4):
        train(run, masks, optimizer, seed=turn)
        before = model(x).detach()
        masks.move(moved(masks, turn))
        assert torch.equal(model(x), before)
        assert_close(passed(model, run, x), expected(model, x))
    assert any(state.left.count for state in block_states(model).values())  # type: ignore[attr-defined]
    assert packed_bytes(model) == packed


@needs_bitsandbytes
def test_bfloat16_values_that_are_left_behind_are_rounded() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", dtype=torch.bfloat16)
    model[0].compute_dtype = model[2].compute_dtype = torch.bfloat16
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    x = torch.randn(8, 32, dtype=torch.bfloat16)
    before = model(x).detach()
    masks.move(moved(masks, 0))
    assert torch.equal(model(x), before)
    masks.move(moved(masks, 1), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(x), before, atol=2e-2)
    assert not torch.equal(model(x), before)


@needs_bitsandbytes
def test_an_adapter_of_moved_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    base = copy.deepcopy(model)
    masks = masks_of(model)
    masks.embed(model)
    for turn in range(3):
        shake(masks, turn)
        masks.move(moved(masks, turn))
    sylva_compile.save_adapter(model, tmp_path)
    sylva_compile.load_adapter(base, tmp_path)
    x = torch.randn(4, 32)
    assert torch.equal(base(x), model(x))
    wanted = expected(model, x)
    assert_close(passed(base, base, x), wanted)
    # A second load takes the place of the first, and forgets what that one left behind.
    sylva_compile.load_adapter(base, tmp_path)
    assert torch.equal(base(x), model(x))


@needs_bitsandbytes
def test_a_state_dict_of_moved_blocks() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    other = copy.deepcopy(model)
    masks, others = masks_of(model), masks_of(other)
    others.embed(other)
    for turn in range(2):
        shake(masks, turn)
        masks.move(moved(masks, turn))
    saved = copy.deepcopy(model.state_dict())
    found = other.load_state_dict(saved, strict=False)
    assert not [name for name in found.unexpected_keys if "left" in name or "places" in name]
    others.follow()
    assert dict(others) == dict(masks)
    x = torch.randn(4, 32)
    assert torch.equal(other(x), model(x))


@needs_bitsandbytes
def test_a_state_dict_from_before_a_move_takes_the_blocks_back() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    other = copy.deepcopy(model)
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    saved, x = copy.deepcopy(model.state_dict()), torch.randn(4, 32)
    wanted = model(x).detach()
    masks.move(moved(masks, 5))
    shake(masks, 2)
    model.load_state_dict(saved, strict=False)
    assert torch.equal(model(x), wanted)
    # A model with as many blocks at other places.
    elsewhere = moved(masks_of(other), 7)
    Masks.from_block_maps(other, {name: mask.block_map() for name, mask in elsewhere.items()}, B).embed(other)
    other.load_state_dict(saved, strict=False)
    assert torch.equal(other(x), wanted)
    del saved["0.weight_places"]
    with pytest.raises(RuntimeError, match="places of its blocks do not fit"):
        other.load_state_dict(saved, strict=False)


@needs_bitsandbytes
def test_compiled_gradients_follow_a_state_dict_of_moved_blocks() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (64, 64, 48))
    other = copy.deepcopy(model)

    def two_blocks(model: Any, col: int) -> Masks:
        maps = {"0.weight": torch.zeros(4, 4, dtype=torch.bool), "2.weight": torch.zeros(3, 4, dtype=torch.bool)}
        for block_map in maps.values():
            block_map[[0, 2], [col, col + 1]] = True
        return Masks.from_block_maps(model, maps, B)

    masks, others = two_blocks(model, 0), two_blocks(other, 0)
    masks.embed(model)
    masks.move(dict(two_blocks(copy.deepcopy(other), 2)))
    shake(masks)
    run = torch.compile(other, backend=sylva_compile.backend(others, inner="aot_eager", on_miss="error"))
    x = torch.randn(8, 64)
    assert_close(passed(other, run, x), expected(other, x))
    other.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    assert_close(passed(other, run, x), expected(model, x))


@needs_bitsandbytes
def test_a_base_that_was_packed_by_an_evaluation_takes_no_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (128, 64, 64))
    base, x = copy.deepcopy(model), torch.randn(4, 128)
    shake(masks_of(model))
    with torch.no_grad():
        trained = model(x)
        # Blocks keep bitsandbytes from packing.
        assert torch.equal(model.eval()(x), trained)
    sylva_compile.save_adapter(model, tmp_path)
    with torch.no_grad():
        base.eval()(x)
    if not getattr(base[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    for unpack in (False, True):
        if unpack:
            base.train().state_dict()
        with pytest.raises(ScopeError, match="load the model again"):
            sylva_compile.load_adapter(base, tmp_path)
        with pytest.raises(ScopeError, match="load the model again"):
            sylva_compile.trace_and_mask(base, method="random", block_size=B)


@needs_bitsandbytes
def test_a_schedule_of_moves_resumes_exactly() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    base = copy.deepcopy(model)

    def training(model: Any) -> tuple[Masks, Any, MovingBlocks]:
        masks = masks_of(model)
        masks.embed(model)
        optimizer = SGD(masks.parameters(), lr=0.1)
        return masks, optimizer, MovingBlocks(masks, every=2, choose="random", seed=0)

    def run(model: Any, parts: tuple[Masks, Any, MovingBlocks], seeds: range) -> None:
        for seed in seeds:
            train(model, parts[0], parts[1], steps=1, seed=seed)
            parts[2].step()

    whole = training(model)
    run(model, whole, range(5))
    saved = copy.deepcopy(whole[2].state_dict())
    again = training(base)
    again[2].load_state_dict(saved)
    x = torch.randn(4, 32)
    assert torch.equal(base(x), model(x))
    run(model, whole, range(5, 9))
    run(base, again, range(5, 9))
    assert torch.equal(base(x), model(x))


@needs_bitsandbytes
@pytest.mark.parametrize("choose", ["gradient", "sketch"])
def test_places_chosen_by_gradients(choose: Any) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    run = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
    schedule = MovingBlocks(masks, every=2, choose=choose, seed=0)
    optimizer = SGD(masks.parameters(), lr=0.1)
    for seed in range(4):
        train(run if seed % 2 else model, masks, optimizer, steps=1, seed=seed)
        schedule.step()
    assert schedule.moves == 2


@needs_bitsandbytes
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_layers_that_are_drawn_train_alone(inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    run: Any = model if inner is None else torch.compile(model, backend=backend)
    layers = {"first": ["0.weight"], "last": ["2.weight"]}
    schedule = LayerSchedule(masks, "random", fraction=0.5, layers=layers)
    optimizer = SGD(masks.parameters(), lr=0.1)
    for seed in range(4):
        before, drawn = [blocks.detach().clone() for blocks in masks.parameters()], schedule.drawn
        train(run, masks, optimizer, steps=1, seed=seed)
        changed = [not torch.equal(*pair) for pair in zip(before, masks.parameters(), strict=True)]
        assert changed == [name in drawn for name in layers]
        schedule.step()
    schedule.close()


@pytest.mark.parametrize("kind", formats(*ALL))
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_disable_adapter_shows_the_base(kind: str, inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    masks = masks_of(model)
    x = torch.randn(4, 32)
    masks.embed(model)
    backend = sylva_compile.backend(masks, inner="aot_eager")
    run: Any = model if inner is None else torch.compile(model, backend=backend)
    base = run(x).detach()
    shake(masks)
    masks.move(moved(masks, 0))
    shake(masks)
    trained, blocks = run(x), [each.detach().clone() for each in masks.parameters()]
    assert not torch.equal(trained, base)
    with sylva_compile.disable_adapter(model):
        with torch.no_grad():
            assert torch.equal(run(x), base)
        with pytest.raises(EmbedError, match="shows its base"):
            SGD(masks.parameters(), lr=1.0).step()
    assert torch.equal(run(x), trained)
    assert all(torch.equal(*pair) for pair in zip(blocks, masks.parameters(), strict=True))
    # The pass from before the block still has its backward pass.
    trained.sum().backward()
    loss = run(x).sum()
    with sylva_compile.disable_adapter(model), pytest.raises((EmbedError, RuntimeError)):
        loss.backward()


@pytest.mark.parametrize("kind", formats(*ALL))
def test_merging_makes_dense_layers(kind: str) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    masks.move(moved(masks, 0))
    x = torch.randn(4, 32)
    wanted = model(x).detach()
    with pytest.raises(AdapterError, match="dequantise=True"):
        sylva_compile.merge_and_unload(model)
    assert torch.equal(model(x), wanted)
    merged = sylva_compile.merge_and_unload(model, dequantise=True)
    assert [type(module) for module in merged] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(merged(x), wanted)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    again = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48))
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(x), wanted)


@needs_bitsandbytes
def test_several_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    x, outputs = torch.randn(4, 32), {}
    for name, seed in (("one", 1), ("two", 2), ("larger", 3)):
        masks = masks_of(model, seed=seed // 3, share=0.2 if seed < 3 else 0.8)
        masks.embed(model)
        shake(masks, seed)
        outputs[name] = model(x).detach()
        sylva_compile.save_adapter(model, tmp_path / name)
        sylva_compile.unload_adapter(model)
    sylva_compile.load_adapter(model, tmp_path / "one", "one")
    sylva_compile.load_adapter(model, tmp_path / "two", "two")
    sylva_compile.load_adapter(model, tmp_path / "larger", "larger")
    for name in ("two", "one", "larger", "two"):
        sylva_compile.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name])


@needs_bitsandbytes
def test_refuses_what_needs_a_dense_base() -> None:
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    with pytest.raises(AdapterError, match="values cannot be written into a packed weight"):
        sylva_compile.changed_values(model)
    with pytest.raises(AdapterError, match="takes dense bases alone"):
        blocks_state(model)
    with pytest.raises(ArgumentError, match="cannot be suppressed in place"):
        LayerSchedule(masks, batches=[0], layers={"first": ["0.weight"], "last": ["2.weight"]})
    with pytest.raises(ArgumentError, match="'random' or 'gradient'"):
        MovingBlocks(masks, every=2, choose="gain", loader=[])
