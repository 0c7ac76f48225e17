"""A step in a quantised base saves what the frozen base saves; without the pass that recomputes weights it does not."""

import copy
from typing import Any

import pytest
import torch
from quantised_models import formats, mlp, needs_bitsandbytes, quantise, quiet
from quantised_twin import masks_of
from torch import Tensor

import sylva_compile
from benchmarks.variants import Variant, llama, saved_bytes

pytestmark = quiet


def saved(base: Any, ids: Tensor, inner: str, *, frozen: bool = False) -> tuple[int, float]:
    """Return saved bytes and the loss of one compiled step of a copy of `base`."""
    model = copy.deepcopy(base)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_(frozen)
    backend: Any = inner
    if not frozen:
        masks = masks_of(model, share=0.05)
        backend = sylva_compile.backend(masks, inner=inner, on_miss="error")  # type: ignore[arg-type]
    run = torch.compile(model, backend=backend)

    def loss() -> Tensor:
        found: Tensor = run(inputs_embeds=inputs, labels=ids).loss
        return found

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return saved_bytes(Variant("sylva", model, loss, trained, inputs))


def base_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = llama(128, 256, 1)
    return quantise(model.bfloat16() if kind.startswith("torchao") else model, kind)


@pytest.mark.parametrize("kind", formats("nf4", "nf4-double", "int8", "torchao-int8", "torchao-float8"))
def test_no_more_than_the_frozen_base(kind: str) -> None:
    base = base_of(kind)
    ids = torch.randint(0, 1024, (4, 64))
    floor, loss = saved(base, ids, "aot_eager", frozen=True)
    ours, same = saved(base, ids, "aot_eager")
    assert ours <= 1.02 * floor
    assert same == pytest.approx(loss, rel=1e-2 if kind.startswith("torchao") else 1e-4)


@needs_bitsandbytes
def test_inductors_code_saves_no_more_either() -> None:
    base = base_of("nf4-double")
    ids = torch.randint(0, 1024, (4, 64))
    assert saved(base, ids, "inductor")[0] <= 1.02 * saved(base, ids, "inductor", frozen=True)[0]


@needs_bitsandbytes
def test_without_the_pass_dense_copies_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("nf4")
    ids = torch.randint(0, 1024, (4, 64))
    ours, _ = saved(base, ids, "aot_eager")
    monkeypatch.setenv("SYLVA_DISABLE_PASSES", "recompute_weights")
    untagged, _ = saved(base, ids, "aot_eager")
    dense = sum(
        4 * module.in_features * module.out_features
        for module in base.model.modules()
        if hasattr(module, "quant_state")
    )
    assert untagged > 1.02 * saved(base, ids, "aot_eager", frozen=True)[0]
    assert untagged - ours > 0.5 * dense


@needs_bitsandbytes
def test_blocks_that_are_frozen_save_no_dense_copy_either() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (128, 128, 128))
    masks = masks_of(model, share=0.1)
    backend = sylva_compile.backend(masks, inner="aot_eager")
    for blocks in masks.parameters():
        blocks.requires_grad_(False)
    run = torch.compile(model, backend=backend)
    x = torch.randn(4, 128, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(x)
    assert max(sizes) < 128 * 128 * 4
    out.sum().backward()
    assert x.grad is not None


@needs_bitsandbytes
def test_an_uncompiled_pass_saves_the_inputs_alone() -> None:
    torch.manual_seed(0)
    model = mlp("nf4", (128, 128), bias=False)
    masks = masks_of(model, share=0.1)
    masks.embed(model)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *masks.parameters())}
    x = torch.randn(4, 128)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in held:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    assert sizes == [4 * 128 * 4]


@needs_bitsandbytes
def test_layers_of_one_shape_share_a_graph() -> None:
    torch.manual_seed(0)
    model = quantise(llama(64, 128, 3), "nf4")
    masks = masks_of(model, share=0.2)
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    assert sylva_compile.compile_layers(model, backend) == 3
    torch._dynamo.utils.counters.clear()
    ids = torch.randint(0, 1024, (2, 16))
    for turn in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        for blocks in masks.parameters():
            assert blocks.grad is not None
            blocks.grad = None
        if turn == 0:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled <= 3
    assert backend.report().rewritten == len(masks)
