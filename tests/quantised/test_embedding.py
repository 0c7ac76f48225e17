"""Blocks in quantised weights: values and gradients against float64, and everything that acts on an embedded model."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_models import ALL, formats, mlp, needs_bitsandbytes, packed_bytes, quantise, quiet
from quantised_twin import B, assert_close, expected, masks_of, passed, shake
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sylva_compile
from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.errors import EmbedError, ScopeError
from sylva_compile.optim import SGD

pytestmark = quiet


@pytest.mark.parametrize("kind", formats(*ALL))
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_a_pass_equals_that_of_the_dense_weight_in_float64(kind: str, inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    backend = sylva_compile.backend(masks, inner=inner or "aot_eager", on_miss="error")
    run = model if inner is None else torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 5, 32)
    assert_close(passed(model, run, x), expected(model, x))
    if inner is not None:
        assert all(weight.uses == 1 and weight.reason is None for weight in backend.report().values())


@needs_bitsandbytes
def test_inductors_code_equals_it_too() -> None:
    torch.manual_seed(0)
    model = mlp("nf4-double")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    run = torch.compile(model, backend=sylva_compile.backend(masks, on_miss="error"), fullgraph=True)
    x = torch.randn(3, 5, 32)
    assert_close(passed(model, run, x), expected(model, x))


@needs_bitsandbytes
@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 4), cols=st.integers(1, 4), tokens=st.integers(1, 3), seed=st.integers(0, 9), bias=st.booleans()
)
def test_any_shape_and_mask(rows: int, cols: int, tokens: int, seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    model = mlp("nf4", (cols * B, rows * B), bias=bias)
    masks = masks_of(model, seed, share=0.5)
    masks.embed(model)
    shake(masks, seed)
    x = torch.randn(tokens, cols * B)
    assert_close(passed(model, model, x), expected(model, x))


@pytest.mark.parametrize("kind", formats(*ALL))
def test_embedding_changes_nothing_and_unloading_restores_every_bit(kind: str) -> None:
    torch.manual_seed(0)
    model = mlp(kind)
    model.train()
    x = torch.randn(4, 32)
    before, packed, classes = model(x), packed_bytes(model), [type(module) for module in model]
    masks = masks_of(model)
    masks.embed(model)
    assert torch.allclose(model(x), before, atol=1e-6)
    optimizer = SGD(masks.parameters(), lr=0.5)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(x), before, atol=1e-3)
    assert packed_bytes(model) == packed
    sylva_compile.unload_adapter(model)
    assert packed_bytes(model) == packed
    assert [type(module) for module in model] == classes
    assert torch.equal(model(x), before)
    assert not any("blocks" in name for name, _ in model.named_parameters())


@needs_bitsandbytes
def test_a_layer_computes_in_its_own_dtype_and_answers_in_that_of_its_input() -> None:
    torch.manual_seed(0)
    model = quantise(nn.Sequential(nn.Linear(32, 48, dtype=torch.bfloat16)), "nf4", torch.float32)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    before = model(x)
    masks = masks_of(model)
    masks.embed(model)
    assert model(x).dtype == torch.bfloat16
    # bitsandbytes' product dequantises into float32, and its dequantisation into the dtype of before: bfloat16.
    assert torch.allclose(model(x), before, atol=2e-2)
    assert masks.parameters()[0].dtype == torch.float32


@needs_bitsandbytes
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_autocast(inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    run: Any = model if inner is None else torch.compile(model, backend=backend)
    x = torch.randn(8, 32)

    def under_autocast(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = run(inputs)
        return out

    assert_close(passed(model, under_autocast, x), expected(model, x), tolerance=0.05)


@needs_bitsandbytes
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_gradient_checkpointing(reentrant: bool, inner: Any) -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    inside: Any = model if inner is None else torch.compile(model, backend=backend)
    x = torch.randn(8, 32)

    def run(inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(inside, inputs, use_reentrant=reentrant)
        return out

    assert_close(passed(model, run, x), expected(model, x))


@needs_bitsandbytes
def test_gradients_accumulate() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    x, y = torch.randn(4, 32), torch.randn(4, 32)
    separate = [passed(model, model, value)[1] for value in (x, y)]
    for value in (x, y):
        model(value).square().mean().backward()
    for blocks, first, second in zip(masks.parameters(), *separate, strict=True):
        assert torch.allclose(blocks.grad, first + second, atol=1e-7)  # type: ignore[arg-type]


@needs_bitsandbytes
@pytest.mark.parametrize("optimizer", ["bitsandbytes", "torchao"])
def test_eight_bit_optimizers_step_the_blocks(optimizer: str) -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (64, 128, 64))
    masks = masks_of(model, share=0.9)
    masks.embed(model)
    made: Any
    if optimizer == "bitsandbytes":
        made = pytest.importorskip("bitsandbytes").optim.AdamW8bit(masks.parameters(), lr=1e-2)
    else:
        made = pytest.importorskip("torchao.optim").AdamW8bit(masks.parameters(), lr=1e-2)
    twin = [nn.Parameter(blocks.detach().clone()) for blocks in masks.parameters()]
    other = type(made)(twin, lr=1e-2)
    x, losses = torch.randn(16, 64), []
    try:
        for _ in range(4):
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            for mine, blocks in zip(twin, masks.parameters(), strict=True):
                mine.grad = blocks.grad.clone()  # type: ignore[union-attr]
            made.step()
            other.step()
            made.zero_grad()
    except (RuntimeError, NotImplementedError) as error:
        if "cpu" in str(error).lower() or "backend" in str(error).lower():
            pytest.skip(f"this optimizer does not work here: {error}")
        raise
    assert losses == sorted(losses, reverse=True)
    for mine, blocks in zip(twin, masks.parameters(), strict=True):
        assert torch.equal(mine, blocks)


@needs_bitsandbytes
def test_a_backward_pass_after_a_step_or_a_move_is_refused() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    loss = model(torch.randn(4, 32)).square().mean()
    shake(masks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model(torch.randn(4, 32)).square().mean()
    mask = masks["0.weight"]
    masks.move({"0.weight": BlockMask.from_block_map(mask.block_map().roll(1, 0), mask.shape, B)})
    with pytest.raises(EmbedError, match="have moved between a forward pass and its backward pass"):
        loss.backward()


@needs_bitsandbytes
def test_copies_and_pickles_train_by_themselves() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    x = torch.randn(4, 32)
    wanted = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), wanted)
        states = block_states(twin)
        optimizer = SGD([state.blocks for state in states.values()], lr=0.5)
        twin(x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(twin(x), wanted)
        assert torch.equal(model(x), wanted)


@needs_bitsandbytes
def test_the_state_dict_holds_the_blocks() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    other = copy.deepcopy(model)
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    saved = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    assert "0.weight_blocks" in saved
    masks_of(other).embed(other)
    # bitsandbytes itself takes no quantised state dict strictly.
    other.load_state_dict(saved, strict=False)
    x = torch.randn(4, 32)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kind", formats())
def test_a_state_dict_of_another_base_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    model, other = mlp(kind), mlp(kind)
    for each in (model, other):
        masks_of(each).embed(each)
    packed, x = packed_bytes(model), torch.randn(4, 32)
    wanted = model(x).detach()
    with pytest.raises(RuntimeError, match="in the state dict is that of another base"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert packed_bytes(model) == packed
    assert torch.equal(model(x), wanted)
    model.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    assert torch.equal(model(x), wanted)


@needs_bitsandbytes
def test_conversions_keep_float32_blocks() -> None:
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    before = [blocks.detach().clone() for blocks in masks.parameters()]
    model.to(torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(before, masks.parameters(), strict=True))
    assert all(blocks.requires_grad for blocks in masks.parameters())


@needs_bitsandbytes
def test_refuses_what_would_lose_the_blocks() -> None:
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    with pytest.raises(EmbedError, match="unload the adapter first"):
        model[0].weight = nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(EmbedError, match="cannot be deleted"):
        del model[0].weight


@needs_bitsandbytes
def test_refuses_other_blocks_that_are_given_for_one_pass() -> None:
    model = mlp("nf4")
    masks_of(model).embed(model)
    others = {name: value + 1 for name, value in model.state_dict().items() if name.endswith("_blocks")}
    x = torch.randn(4, 32)
    with pytest.raises(EmbedError, match="swapped past the module"):
        torch.func.functional_call(model, others, (x,))
    with torch.no_grad(), pytest.raises(EmbedError, match="swapped past the module"):
        torch.func.functional_call(model, others, (x,))


@needs_bitsandbytes
def test_an_evaluation_packs_no_layer_that_gradients_pass() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (64, 128, 64), bias=False)
    base, x = copy.deepcopy(model), torch.randn(4, 64)
    masks = Masks.from_block_maps(model, {"0.weight": torch.eye(8, 4, dtype=torch.bool)}, B)
    masks.embed(model)
    [blocks] = masks.parameters()

    def gradient() -> Tensor:
        blocks.grad = None
        model.train()(x).square().mean().backward()
        assert blocks.grad is not None
        return blocks.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(x)
    assert torch.equal(gradient(), before)
    sylva_compile.unload_adapter(model)
    assert vars(model[2]).keys() == vars(base[2]).keys()
    with torch.no_grad():
        model.eval()(x)
    if not getattr(model[2].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs nothing on this CPU")
    base[2] = model[2]
    with pytest.raises(EmbedError, match=r"2.weight was packed .* load the model again"):
        Masks.from_block_maps(base, {"0.weight": torch.eye(8, 4, dtype=torch.bool)}, B).embed(base)
    assert not block_states(base)


@needs_bitsandbytes
def test_refuses_blocks_that_do_not_divide_a_weight() -> None:
    model = mlp("nf4", (32, 72))
    with pytest.raises(ScopeError, match="blocks of 16 do not divide it"):
        Masks.from_block_maps(model, {"0.weight": torch.ones(5, 2, dtype=torch.bool)}, B)
    with pytest.raises(ScopeError, match="blocks of 16 do not divide it"):
        sylva_compile.trace_and_mask(model, method="random", block_size=B)
    assert sylva_compile.trace_and_mask(model, method="random", block_size=8)["0.weight"].shape == (72, 32)


@needs_bitsandbytes
def test_refuses_layers_with_a_forward_of_their_own() -> None:
    model = mlp("nf4")
    before = model[2].forward
    model[2].forward = lambda x: before(x) + 1
    masks = masks_of(model)
    with pytest.raises(ScopeError, match=r"2.weight is quantised .* forward is not that of a linear layer"):
        masks.embed(model)
    with pytest.raises(ScopeError, match="forward is not that of a linear layer"):
        sylva_compile.trace_and_mask(model, method="random", block_size=B)
    assert not block_states(model)

    class Own(type(model[0])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2  # type: ignore[no-any-return]

    model = mlp("nf4")
    model[0].__class__ = Own
    with pytest.raises(ScopeError, match=r"0.weight is quantised .* of a Own"):
        masks_of(model).embed(model)


@needs_bitsandbytes
@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_dense_and_quantised_weights_in_one_model(inner: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*mlp("nf4", (32, 64)), nn.GELU(), nn.Linear(64, 48)).requires_grad_(False)
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=B)
    masks.embed(model)
    shake(masks)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    run: Any = model if inner is None else torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(8, 32)
    assert_close(passed(model, run, x), expected(model, x))
    assert model.state_dict().keys() >= {"0.weight_blocks", "2.weight"}
    assert "2.weight_blocks" not in model.state_dict()


@needs_bitsandbytes
def test_modules_that_share_a_quantised_weight_share_its_blocks() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (32, 32, 32))
    model[2].weight = model[0].weight
    base = copy.deepcopy(model[0].weight.quant_state)
    masks = Masks.from_block_maps(model, {"0.weight": torch.eye(2, dtype=torch.bool)}, B)
    masks.embed(model)
    shake(masks)
    [state] = block_states(model).values()
    assert model[0].weight_blocks is model[2].weight_blocks is state.blocks
    x = torch.randn(4, 32)
    model(x).square().mean().backward()
    found, state.blocks.grad = state.blocks.grad, None
    step = 1e-2
    with torch.no_grad():
        wanted = torch.zeros(2)
        for sign in (1, -1):
            state.blocks[1, 3, 5] += sign * step
            wanted += sign * model(x).square().mean() / (2 * step)
            state.blocks[1, 3, 5] -= sign * step
    assert found is not None
    assert torch.allclose(found[1, 3, 5], wanted[0], rtol=1e-2)
    assert torch.equal(base.absmax, model[0].weight.quant_state.absmax)


@needs_bitsandbytes
def test_checkpointed_layers_inside_of_a_compiled_graph() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)

    def run(inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(model, inputs, use_reentrant=False)
        return out

    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    x = torch.randn(8, 32)
    assert_close(passed(model, compiled, x), expected(model, x))


@pytest.mark.parametrize("kind", formats("nf4", "torchao-int8"))
def test_pruning_needs_a_dense_base(kind: str) -> None:
    with pytest.raises(ScopeError, match=r"quantised|computes otherwise"):
        sylva_compile.prune_masks(mlp(kind), n=2, m=4)


@needs_bitsandbytes
def test_trainable_parameters_count_elements_and_not_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp("nf4", (32, 64), bias=False)
    Masks.from_block_maps(model, {"0.weight": torch.eye(4, 2, dtype=torch.bool)}, B).embed(model)
    sylva_compile.print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 512 || all params: 2,048 || trainable%: 25.0000\n"


@needs_bitsandbytes
def test_distributed_data_parallel_averages_the_blocks() -> None:
    torch.manual_seed(0)
    model = mlp("nf4")
    masks = masks_of(model)
    masks.embed(model)
    shake(masks)
    x = torch.randn(8, 32)
    alone = passed(model, model, x)[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert all(torch.equal(*pair) for pair in zip(passed(model, wrapped, x)[1], alone, strict=True))
    finally:
        dist.destroy_process_group()
