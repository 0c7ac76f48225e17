"""A kernel steps each block by the number of steps since the block's own states started from zero."""

from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sylva_compile.kernels.blocks import grid_shape, read_blocks
from sylva_compile.kernels.step.cpu import CpuLaunch
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.kernels.step.lowering import G, P, Rule, height, t, width
from sylva_compile.kernels.step.table import Slot, Target
from sylva_compile.optim import rules
from sylva_compile.optim.launches import Launches, lowered

CPU = torch.device("cpu")
M = sp.MatrixSymbol("M", height, width)
NUMBER = sp.Symbol("number", real=True)
GROUP = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.5}
RULES = [
    rules.adam(decoupled=True),
    rules.adam(decoupled=False, amsgrad=True),
    rules.sgd(momentum=True, dampening=True),
    rules.lion(),
    Rule("Matrices", ((M, M + G / t), (NUMBER, t + sp.Trace(P.T * P)), (P, P - M / (NUMBER + t))), ((M, "m"),), ()),
    Rule("Stateless", ((P, P - G / t),), (), ()),
]


def step(kind: Any, rule: Rule, slots: list[Slot], gradients: list[Tensor], *, stochastic: bool = False) -> None:
    launch = kind(lowered(rule), CPU, stochastic=stochastic)
    launch.describe(slots, gradients)
    total = sum(float(gradient.double().square().sum()) for gradient in gradients)
    assert float(launch.squares().sum()) == pytest.approx(total, rel=1e-6)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    launch.step(Launches(stochastic=False).hyperparameters(rule, [GROUP], CPU), one, zero, 0)


@pytest.mark.parametrize("kind", [CpuLaunch, EagerLaunch])
@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
@settings(max_examples=15, deadline=None)
@given(
    b=st.sampled_from([1, 5, 8, 24, 40, 64, 72]),
    # 80 blocks of 5 x 5, and 70 of 8 x 8, fill more than one tile.
    ages=st.lists(st.sampled_from([0, 0, 0, 1, 3, 40, 999, 1000]), min_size=1, max_size=6).map(lambda few: few * 14),
    weight=st.sampled_from([None, torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_as_if_each_block_were_a_parameter(
    kind: Any, rule: Rule, b: int, ages: list[int], weight: torch.dtype | None, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    ages = ages[: 6 if b > 24 else None]
    count, steps = len(ages), 1000.0
    blocks = torch.randn(count, b, b, dtype=dtype)
    gradient = torch.randn_like(blocks)
    states = tuple(torch.rand_like(blocks) for _ in rule.states)
    born = steps - torch.tensor(ages, dtype=torch.float32)
    matrices: list[Tensor] = []
    positions = torch.zeros(2, count, dtype=torch.int64)
    if weight is not None:
        shape = (7 * b - b // 3, (count // 7 + 1) * b - b // 2)
        places = torch.randperm(7 * grid_shape(shape, b)[1])[:count]
        positions = torch.stack([places % 7, places // 7])
        matrices = [torch.randn(shape).to(weight) for _ in range(2)]
        matrices[1].copy_(matrices[0])
        inside = read_blocks(torch.ones(shape, dtype=dtype), positions, b)
        blocks, gradient, states = blocks * inside, gradient * inside, tuple(state * inside for state in states)

    def slot(at: slice, turn: int, count_of_steps: float, born: Tensor | None) -> Slot:
        target = Target(matrices[turn], positions[:, at].contiguous(), b, True) if matrices else None
        own = (each[at].clone() for each in (blocks, *states))
        return Slot(next(own), tuple(own), torch.tensor(count_of_steps), 0, 0, target, born)

    plain = Slot(torch.randn(50), tuple(torch.rand(50) for _ in states), torch.tensor(2.0), 0, 0, None)
    together = slot(slice(None), 0, steps, born)
    apart = [slot(slice(k, k + 1), 1, float(age), None) for k, age in enumerate(ages)]
    more = [] if rule.is_over_blocks else [plain]
    step(kind, rule, [together, *more], [gradient, *(torch.ones(50) for _ in more)])
    step(kind, rule, apart, [gradient[k : k + 1].clone() for k in range(count)])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for found, *wanted in zip(
        (together.param, *together.states), *((one.param, *one.states) for one in apart), strict=True
    ):
        torch.testing.assert_close(found, torch.cat(wanted), rtol=tolerance, atol=tolerance)
    assert not torch.equal(together.param, blocks)
    assert together.step is not None and float(together.step) == steps + 1
    if matrices and kind is CpuLaunch:
        torch.testing.assert_close(matrices[0], matrices[1], rtol=8e-3, atol=1e-6)
        values = read_blocks(matrices[0], positions, b)
        assert torch.equal(values, together.param.to(values.dtype) * inside.to(values.dtype))


@pytest.mark.parametrize("kind", [CpuLaunch, EagerLaunch])
def test_random_bits_depend_on_the_step_of_the_parameter(kind: Any) -> None:
    ends = []
    for born in (None, torch.tensor([0.0, 0.0]), torch.tensor([5.0, 5.0])):
        torch.manual_seed(0)
        # Lion does not read the number of the step.
        state = torch.rand(2, 8, 8).bfloat16()
        slot = Slot(torch.randn(2, 8, 8), (state,), torch.tensor(7.0), 0, 0, None, born)
        step(kind, rules.lion(), [slot], [torch.ones(2, 8, 8)], stochastic=True)
        ends.append(state)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
