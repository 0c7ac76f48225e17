"""Pruned layers compute SLoPe's equations: `nm_twin` has them, dense and in float64, with masks by loops."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nm_twin import Twin
from prune_two_ranks import Net
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from transformers.pytorch_utils import Conv1D

import sylva_compile
from sylva_compile.kernels.nm_transpose import nm_transpose

RATE, DECAY = 0.05, 0.1
PATTERNS = [(1, 2), (2, 4), (2, 8), (1, 4)]


@dataclass
class Drawn:
    n: int
    m: int
    out: int
    size: int
    tokens: int
    conv: bool
    double: bool
    rank: int
    prune: Any
    ours: bool


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    n, m = draw(st.sampled_from(PATTERNS))
    sizes = st.integers(1, 3).map(lambda k: k * m)
    return Drawn(
        n=n,
        m=m,
        out=draw(sizes),
        size=draw(sizes),
        tokens=draw(st.integers(1, 5)),
        conv=draw(st.booleans()),
        double=draw(st.booleans()),
        rank=draw(st.integers(1, 3)),
        prune=draw(st.sampled_from(["creation", "fold"])),
        ours=draw(st.booleans()),
    )


def layer_of(case: Drawn) -> nn.Module:
    layer = Conv1D(case.out, case.size) if case.conv else nn.Linear(case.size, case.out, bias=case.tokens % 2 == 0)
    return nn.Sequential(layer).double()


def stored(case: Drawn, matrix: Tensor) -> Tensor:
    """Return `matrix [out, in]` as the module stores it."""
    return matrix.t() if case.conv else matrix


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-11, atol=1e-12)


def check_step(case: Drawn, model: Any, twin: Twin, optimizer: Any) -> None:
    """Compare a forward pass, all gradients and a step with the twin's."""
    x = torch.randn(1, case.tokens, case.size, dtype=torch.float64, requires_grad=True)
    out = model(x)
    close(out[0], twin.forward(x.detach()[0]))
    gy = torch.randn_like(out)
    optimizer.zero_grad()
    out.backward(gy)
    wanted = twin.backward(x.detach()[0], gy[0])
    layout = model[0]._nm_layout
    assert x.grad is not None
    close(x.grad[0], wanted["x"])
    close(layout.dense(model[0].weight_values.grad), stored(case, wanted["weight"]).contiguous())
    if twin.left is not None:
        low_rank = model[0]._nm_low_rank
        close(low_rank.dense_left(model[0].weight_left.grad, low_rank.codes), wanted["left"])
        close(model[0].weight_right.grad, wanted["right"])
    optimizer.step()
    twin.step(wanted, RATE, DECAY)
    check_values(case, model, twin)


def check_values(case: Drawn, model: Any, twin: Twin) -> None:
    found = model.state_dict()
    close(found["0.weight"], stored(case, twin.weight).contiguous())
    if twin.left is not None and twin.right is not None:
        close(found["0.weight_left"], twin.left)
        close(found["0.weight_right"], twin.right)


@given(drawn())
@settings(max_examples=40, deadline=None)
def test_training_adapters_and_folding_are_the_equations(case: Drawn) -> None:
    torch.manual_seed(case.out * 7 + case.size)
    model = layer_of(case)
    weight = model[0].weight.detach()
    bias = model[0].bias
    twin = Twin(
        stored(case, weight).clone(), None if bias is None else bias.detach().clone(), case.n, case.m, case.double
    )
    masks = sylva_compile.prune_masks(model, case.n, case.m, double=case.double)
    assert torch.equal(masks["0.weight"].dense(), stored(case, twin.R))
    kind = sylva_compile.AdamW if case.ours else torch.optim.AdamW
    optimizer = kind(masks.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(3):
        check_step(case, model, twin, optimizer)
        if step == 1:
            masks.change_masks()
            twin.change()
    generator = torch.Generator().manual_seed(case.rank)
    again = torch.Generator().manual_seed(case.rank)
    added = sylva_compile.add_low_rank(model, case.rank, prune=case.prune, generator=generator)
    left = torch.randn(case.size, case.rank, generator=again, dtype=torch.float64)
    twin.add(left, prune=case.prune == "creation")
    optimizer.add_param_group({"params": added})
    for _ in range(3):
        check_step(case, model, twin, optimizer)
    x = torch.randn(case.tokens, case.size, dtype=torch.float64)
    before = copy.deepcopy(model)
    sylva_compile.fold_low_rank(model)
    if case.prune == "fold":
        assert twin.left is not None
        pruned = Twin(twin.left.t().clone(), None, case.n, case.m, double=False).weight.t()
        twin.left = pruned
    else:
        close(before(x), twin.forward(x))
    with torch.no_grad():
        close(model(x), twin.forward(x))
    check_values(case, model, twin)
    close(
        sylva_compile.export_pruned(model)["0.weight"],
        stored(case, twin.weight + (twin.left @ twin.right / case.rank).t()).contiguous(),
    )


@pytest.mark.parametrize(("n", "m", "share"), [(2, 4, 0.40625), (1, 2, 0.375), (2, 8, 0.191), (1, 4, 0.172)])
def test_random_weights_keep_the_share_of_the_paper(n: int, m: int, share: float) -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    masks = sylva_compile.prune_masks(model, n, m)
    layout = masks.modules()["0.weight"]._nm_layout
    second = nm_transpose(torch.ones(512, 512 // m * n), layout.codes, layout.second, n, m)
    kept = second.sum() / (512 * 512)
    assert abs(float(kept) - share) < 0.003
    assert f"{float(kept):.1%}" in masks.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_gathers_the_second_operand_in_the_backward_pass(dtype: torch.dtype) -> None:
    ops: dict[str, list[str]] = {}

    def compiler(name: str) -> Any:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            ops[name] = [str(node.target) for node in graph.graph.nodes]
            return make_boxed_func(graph)

        return compile_graph

    model = Net().to(dtype)
    sylva_compile.prune_masks(model).embed()
    compilers = {"fw_compiler": compiler("forward"), "bw_compiler": compiler("backward")}
    model.compile(backend=aot_autograd(**compilers, partition_fn=min_cut_rematerialization_partition))
    model(torch.randn(3, 16, dtype=dtype, requires_grad=True)).sum().backward()
    assert "sylva.nm_transpose.default" not in ops["forward"]
    assert ops["backward"].count("sylva.nm_transpose.default") == 2
