"""Kernels of rules over blocks compute what torch's operations compute, and use memory again only when it is free."""

import os
import subprocess
import sys
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_invariant, random_masks
from torch import nn

from sylva_compile.kernels.step.block_codegen import _places, _reads
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.kernels.step.lowering import G, P, Repeat, Rule, height, t, width
from sylva_compile.kernels.step.matrix_lowering import lower_matrices
from sylva_compile.kernels.step.matrix_program import Elementwise, Product, Transpose
from sylva_compile.optim import GeneratedOptimizer, launches, rules

M, X, Y = (sp.MatrixSymbol(name, height, width) for name in "MXY")
A, B = (sp.MatrixSymbol(name, width, width) for name in "AB")
C = sp.MatrixSymbol("C", height, height)
NORM = sp.Symbol("norm", real=True)
STATES = ((M, "m"),)

RULES = {
    "transposes": ((A, G.T * P), (C, G * P.T), (P, P - 0.1 * C.T * G * A.T), (M, P)),
    "swap": ((X, P), (P, M + G), (M, X)),
    "powers": ((A, G.T * G / sp.Trace(G.T * G)), (P, P - G * A**3), (M, M + P * A)),
    "elementwise": ((X, sp.HadamardProduct(G, G, P)), (M, M + X), (P, P - sp.HadamardProduct(M, G))),
    "numbers": (
        (NORM, sp.sqrt(sp.Trace(G * G.T)) + sp.Max(height, 2 * width)),
        (M, M + G / NORM),
        (P, P - sp.sqrt(height / width) * M / t),
    ),
    "loop": (
        (X, G),
        (NORM, sp.Integer(2)),
        Repeat(3, ((A, X.T * X), (NORM, NORM + sp.sqrt(sp.Trace(A.T * A))), (X, M), (M, (X + G - X * A) / NORM))),
        (P, P - X / NORM),
    ),
    "turns": ((X, G), (Y, P), Repeat(3, ((Y, X), (X, M + 2 * X), (M, Y))), (P, P - X)),
    "many": (
        (A, G.T * G),
        (B, P.T * P),
        (A, A * B + B * A.T + A),
        (C, P * A * G.T),
        (P, P - C * G * B),
        (M, M - P * A),
    ),
}


class Once(GeneratedOptimizer):
    """An optimizer of one rule."""

    def __init__(self, parameters: list[nn.Parameter], rule: Rule) -> None:
        self._rule = rule
        super().__init__(parameters, {})

    def rule(self, group: Any) -> Rule:
        return self._rule


def stepped(rule: Rule, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(size)
    blocks = nn.Parameter((torch.randn(3, size, size, dtype=torch.float64) / size**0.5).to(dtype))
    optimizer = Once([blocks], rule)
    for _ in range(2):
        blocks.grad = (torch.randn(3, size, size, dtype=torch.float64) / size**0.5).to(dtype)
        optimizer.step()
    return [blocks.detach(), optimizer.state[blocks]["m"]]


@pytest.mark.parametrize("size", [1, 5, 16, 40, 48, 64, 80])
@pytest.mark.parametrize("name", RULES)
def test_is_torchs(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(name, RULES[name], STATES, ())
    found = stepped(rule, size, torch.float32), stepped(rule, size, torch.float64)
    monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
    exact = stepped(rule, size, torch.float64)
    for values, tolerance in zip(found, (1e-4, 1e-12), strict=True):
        for value, wanted in zip(values, exact, strict=True):
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance * scale)


def test_variables_of_a_loop_change_all_at_once() -> None:
    rule = Rule("Turns", RULES["turns"], STATES, ())
    blocks = nn.Parameter(torch.randn(3, 20, 20))
    blocks.grad = torch.randn(3, 20, 20)
    x, y, m = blocks.grad.clone(), blocks.detach().clone(), torch.zeros(3, 20, 20)
    for _ in range(3):
        y = x
        x = m + 2 * x
        m = y
    wanted = blocks.detach() - x
    Once([blocks], rule).step()
    torch.testing.assert_close(blocks.detach(), wanted)


@pytest.mark.parametrize("name", RULES)
def test_blocks_over_an_edge_are_the_matrices_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(name, RULES[name], STATES, ())
    ends = []
    for kind in (launches.CpuLaunch, EagerLaunch):
        monkeypatch.setattr(launches, "CpuLaunch", kind)
        torch.manual_seed(0)
        model = nn.Linear(21, 13, bias=False)
        masks = random_masks(model, ["weight"], 8, 1.0)
        masks.embed()
        (blocks,) = masks.parameters()
        optimizer = Once([blocks], rule)
        alone = nn.Parameter(blocks.detach()[-1:, :5, :5].clone())
        other = Once([alone], rule)
        for _ in range(2):
            blocks.grad = torch.randn_like(blocks) / 3
            alone.grad = blocks.grad[-1:, :5, :5].clone()
            optimizer.step()
            other.step()
        assert_invariant(model, masks)
        # The last block has 5 rows and 5 columns inside.
        torch.testing.assert_close(blocks.detach()[-1:, :5, :5], alone.detach(), rtol=1e-4, atol=1e-5)
        ends.append(blocks.detach().clone())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


def test_source_does_not_depend_on_hashes() -> None:
    program = """
from sylva_compile.kernels.step.codegen import cpp_source, triton_source
from sylva_compile.optim import rules
from sylva_compile.optim.launches import lowered
muon = lowered(rules.muon(nesterov=True, ns_steps=5, scaled=True))
print(cpp_source(muon) + triton_source(muon))
"""
    made = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert made[0] == made[1]
    assert "multiply" in made[0]


@pytest.mark.parametrize("name", [*RULES, "Muon"])
def test_no_matrix_is_overwritten_before_its_last_use(name: str) -> None:
    rule = Rule(name, RULES[name], STATES, ()) if name in RULES else rules.muon(nesterov=True, ns_steps=5, scaled=True)
    program = lower_matrices(rule).unrolled()
    places, buffers = _places(program)
    holds = {places[symbol]: symbol for symbol in program.inputs}
    for statement in program.statements:
        for symbol in _reads(statement):
            assert symbol not in places or holds[places[symbol]] == symbol, statement
        if isinstance(statement, Product):
            assert places[statement.target] not in (places[statement.left], places[statement.right])
        if isinstance(statement, Transpose):
            assert places[statement.target] != places[statement.source]
        if isinstance(statement, Product | Transpose | Elementwise):
            holds[places[statement.target]] = statement.target
    assert all(holds[places[symbol]] == symbol for symbol in program.results)
    assert buffers == max(places.values()) + 1
    if name == "Muon":
        assert buffers == 5


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 70), count=st.integers(0, 4), steps=st.integers(1, 3))
def test_blocks_without_a_weight(size: int, count: int, steps: int) -> None:
    rule = Rule("Normalised", ((M, M + G), (P, P - M / sp.sqrt(1 + sp.Trace(M.T * M)))), STATES, ())
    blocks = nn.Parameter(torch.randn(count, size, size))
    values, total = blocks.detach().clone(), torch.zeros(count, size, size)
    optimizer = Once([blocks], rule)
    for _ in range(steps):
        blocks.grad = torch.randn(count, size, size)
        optimizer.step()
        total += blocks.grad
        values -= total / (1 + total.square().sum((1, 2), keepdim=True)).sqrt()
    torch.testing.assert_close(blocks.detach(), values)
