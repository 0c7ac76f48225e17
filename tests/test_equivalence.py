"""Sampled block gradients equal the blocks gathered from the dense gradient, for every shape and dtype."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from oracle import block_gradients, blocks_by_loops
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks


class Once(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.lin(first)


class CalledTwice(Once):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.lin(first) - 0.5 * self.lin(second)


class ReadOnceUsedTwice(Once):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        weight = self.lin.weight
        return F.linear(first, weight, self.lin.bias) + F.linear(second, weight)


def representable(*shape: int) -> Tensor:
    """Return random values that bfloat16 holds exactly, so that only the products round."""
    return torch.randn(*shape).bfloat16().float()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    block_size = draw(st.sampled_from([8, 16, 24, 32, 64, 128]))
    most = 3 * block_size
    return {
        "block_size": block_size,
        "outputs": draw(st.integers(1, most)),
        "inputs": draw(st.integers(block_size, most)),
        "tokens": draw(st.tuples(st.integers(1, 3), st.integers(1, 40))),
        "share": draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", [Once, CalledTwice, ReadOnceUsedTwice])
@settings(max_examples=6, deadline=None)
@given(case=cases())
def test_block_gradients_equal_the_gathered_dense_gradient(kind: type[Once], precision: str, case: dict) -> None:
    torch._dynamo.reset()
    torch.manual_seed(case["seed"])
    model = kind(case["inputs"], case["outputs"], case["bias"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(representable(*parameter.shape))
    if precision == "bfloat16":
        model = model.bfloat16()
    dtype = model.lin.weight.dtype
    first, second = (representable(*case["tokens"], case["inputs"]).to(dtype) for _ in range(2))
    weigh = representable(*case["tokens"], case["outputs"])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")

    def loss_of(run: nn.Module, wide: torch.dtype | None = None) -> Tensor:
        operands = [t.to(wide or dtype) for t in (first, second)]
        out = run(*operands)
        return (out * weigh.to(out.dtype)).sum()

    with autocast:
        dense, *rest = torch.autograd.grad(loss_of(model), list(model.parameters()))
    exact_model = kind(case["inputs"], case["outputs"], case["bias"]).double()
    exact_model.load_state_dict(model.state_dict())
    (exact,) = torch.autograd.grad(loss_of(exact_model, torch.float64), [exact_model.lin.weight])

    block_map = torch.rand(*(-(-size // case["block_size"]) for size in model.lin.weight.shape)) < case["share"]
    masks = Masks.from_block_maps(model, {"lin.weight": block_map}, case["block_size"])
    backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
    compiled = torch.compile(model, backend=backend)
    with autocast:
        loss_of(compiled).backward()
    assert backend.report()["lin.weight"].rewritten
    mask = masks["lin.weight"]
    found = block_gradients(model, masks)["lin.weight"]
    assert found.dtype == torch.float32
    wanted = blocks_by_loops(exact, mask)
    assert torch.equal(found[wanted == 0], torch.zeros_like(found[wanted == 0])) or case["share"] == 0.0
    if mask.nnz:
        budget = (blocks_by_loops(dense.double(), mask) - wanted).abs().max()
        rounding = torch.finfo(torch.float32).eps * case["tokens"][0] * case["tokens"][1] * exact.abs().max()
        assert (found - wanted).abs().max() <= budget + rounding
    if case["bias"]:
        torch.testing.assert_close(model.lin.bias.grad, rest[0])
