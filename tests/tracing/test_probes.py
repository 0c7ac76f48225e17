"""Probes on models of one process: whole weights are read through them as gathered ones are."""

import pytest
import torch
from torch import nn

from sylva_compile.errors import TraceError
from sylva_compile.kernels.observe import observing
from sylva_compile.tracing.capture import capture_backend
from sylva_compile.tracing.probes import probes


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8)).requires_grad_(False)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}


def test_a_compiled_pass_shows_the_operands_of_frozen_weights() -> None:
    model, twin, x = small(), small(), torch.randn(5, 8)
    twin.load_state_dict(model.state_dict())
    twin.requires_grad_(True)(x).square().sum().backward()
    weights, seen = weights_of(model), {}

    def listen(leaf, lhs, rhs, activation_is_lhs, offsets) -> None:  # type: ignore[no-untyped-def]
        seen[leaf.data_ptr()] = lhs.t() @ rhs

    with probes(model, weights) as leaves, observing(listen):
        # Dynamo compiles no code of torch's own.
        compiled = torch.compile(lambda x: model(x), backend=capture_backend(lambda *missed: None))
        loss = compiled(x).square().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert [float(gradient) for gradient in gradients] == [0.0, 0.0]
    for name, leaf in leaves.items():
        torch.testing.assert_close(seen[leaf.data_ptr()], twin.get_parameter(name).grad)
    torch._dynamo.reset()


def test_uncompiled_code_is_told_by_the_gradient_of_the_probe() -> None:
    model = small()
    with probes(model, weights_of(model)) as leaves:
        loss = model(torch.randn(5, 8)).sum()
        assert [float(g) for g in torch.autograd.grad(loss, list(leaves.values()))] == [1.0, 1.0]
        with torch.no_grad():
            assert model[0].weight is model[0]._parameters["weight"]


@pytest.mark.parametrize("fails", [False, True])
def test_modules_are_left_as_they_were(fails: bool) -> None:
    model = small()
    before = [(type(module), dict(module._parameters)) for module in model.modules()]
    try:
        with probes(model, weights_of(model)):
            assert type(model[0]).__name__ == "ProbedLinear" and isinstance(model[0], nn.Linear)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert [(type(module), dict(module._parameters)) for module in model.modules()] == before


def test_a_shared_weight_has_one_probe() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with probes(model, {"0.weight": model[0].weight}) as leaves:
        assert model[0].weight_probe is model[1].weight_probe is leaves["0.weight"]


def test_a_parameter_of_that_name_is_refused() -> None:
    model = small()
    model[2].register_parameter("weight_probe", nn.Parameter(torch.zeros(3)))
    with pytest.raises(TraceError, match="rename it"), probes(model, weights_of(model)):
        pass
    assert type(model[0]) is nn.Linear and model[2].weight_probe.shape == (3,)
