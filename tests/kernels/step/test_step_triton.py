"""The generated Triton kernels against the C++ ones, on a GPU where there is one, else in Triton's interpreter.

As in `test_sddmm_triton.py`, the interpreter needs a process of its own, in which this file runs itself again.
"""

import copy
import os
from typing import Any

import pytest
import sympy as sp
import torch
import triton
from interpreter import run_in_interpreter
from oracle import assert_invariant, random_masks
from packaging.version import Version
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sylva_compile import Masks
from sylva_compile.kernels.step.codegen import triton_source
from sylva_compile.kernels.step.lowering import G, P, Repeat, Rule, height, lower, t, width
from sylva_compile.kernels.step.triton_launch import TILE, TritonLaunch, _import, warps_for
from sylva_compile.optim import SGD, Adam, AdamW, GeneratedOptimizer, Lion, Muon, RMSprop, launches, rules

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the cases run in this process")
@pytest.mark.skipif(Version(triton.__version__) < Version("3.7"), reason="as for sddmm, from Triton 3.7 on")
def test_the_kernels_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


class Mixed(nn.Module):
    """Weights, transposed, sliced and with blocks over their edges, and ordinary parameters of every dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(40, 50))
        self.second = nn.Parameter(torch.randn(30, 45).bfloat16().t())
        self.third = nn.Parameter(torch.randn(32, 64)[:, ::2].half())
        self.bias = nn.Parameter(torch.randn(5000))
        self.norm = nn.Parameter(torch.randn(70).bfloat16())
        self.scale = nn.Parameter(torch.randn(9, 3).half())
        self.late = nn.Parameter(torch.randn(4))


WEIGHTS = ["first", "second", "third"]


def trained(device: str, kind: type[GeneratedOptimizer], options: dict[str, Any]) -> tuple[Mixed, GeneratedOptimizer]:
    """Three steps, one of which misses a gradient."""
    torch.manual_seed(7)
    model = Mixed()
    masks = random_masks(model, WEIGHTS, 16, 0.6)
    model.to(device)
    masks = Masks(masks, model=model)
    optimizer = kind([*masks.parameters(), model.bias, model.norm, model.scale, model.late], lr=0.01, **options)
    parameters = optimizer.param_groups[0]["params"]
    for turn in range(3):
        for blocks in parameters:
            blocks.grad = torch.randn(blocks.shape).to(blocks)
        if turn == 1:
            model.late.grad = None
        optimizer.step()
        assert_invariant(model, masks)
    return model, optimizer


@needs_triton
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"weight_decay": 0.1}),
        (AdamW, {"amsgrad": True, "maximize": True, "max_grad_norm": 1.0}),
        (Adam, {"weight_decay": 0.1, "state_dtype": torch.bfloat16, "seed": 3}),
        (SGD, {}),
        (SGD, {"momentum": 0.9, "dampening": 0.5, "nonfinite": "raise"}),
        (Lion, {"weight_decay": 0.1}),
        (RMSprop, {"centered": True, "momentum": 0.9, "eps": 1e-3}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "plain",
)
def test_is_the_cpus(kind: type[GeneratedOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, reference = trained("cpu", kind, options)
    monkeypatch.setattr(launches, "CpuLaunch", TritonLaunch)
    found, optimizer = trained(DEVICE, kind, options)
    assert [type(launch) for launch in optimizer._launches] == [TritonLaunch]
    for (name, value), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[value.dtype]
        torch.testing.assert_close(value.cpu(), other, rtol=tolerance, atol=tolerance, msg=name)
    ours, theirs = optimizer.state_dict()["state"], reference.state_dict()["state"]
    for index, states in theirs.items():
        for name, value in states.items():
            same = (ours[index][name].cpu().float() - value.float()).abs() <= 1e-6 * max(1.0, float(value.abs().max()))
            # Stochastic rounding turns on the last bit now and then.
            assert float(same.float().mean()) > 0.999, (index, name)


def stepped_by_muon(sizes: list[int], device: str, **options: Any) -> tuple[list[nn.Parameter], Muon]:
    """Three steps of blocks of several sizes, over edges, of weights of several dtypes, and one without a weight."""
    torch.manual_seed(3)
    blocks: list[nn.Parameter] = []
    for size in sizes:
        if size > 50:
            blocks.append(nn.Parameter(torch.randn(2, size, size).to(device)))
            continue
        model = Mixed()
        masks = random_masks(model, WEIGHTS, size, 0.6)
        model.to(device)
        blocks += Masks(masks, model=model).parameters()
        models.append((model, masks))
    blocks.append(nn.Parameter(torch.randn(3, 20, 20, device=device)))
    optimizer = Muon(blocks, lr=0.01, **options)
    for _ in range(3):
        for each in blocks:
            each.grad = torch.randn(each.shape).to(each)
        optimizer.step()
    return blocks, optimizer


models: list[tuple[nn.Module, Masks]] = []
"""Keeps the weights of `stepped_by_muon` alive."""


@needs_triton
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([8], {"weight_decay": 0.1, "nesterov": False}),
        ([16, 24], {"max_grad_norm": 1.0, "adjust_lr_fn": "original"}),
        ([30], {"state_dtype": torch.bfloat16, "seed": 3, "ns_steps": 2}),
        ([72], {"ns_coefficients": (2.0, -1.5, 0.5)}),
        ([16], {"products": "tf32"}),
        pytest.param(
            [16],
            {"products": "bfloat16"},
            marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies the bits of bfloat16 as integers"),
        ),
    ],
    ids=["8", "16 and 24", "30", "72", "tf32", "bfloat16"],
)
def test_blocks_are_stepped_as_by_the_cpu(
    sizes: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, reference = stepped_by_muon(sizes, "cpu", **options)
    monkeypatch.setattr(launches, "CpuLaunch", TritonLaunch)
    found, optimizer = stepped_by_muon(sizes, DEVICE, **options)
    assert [type(launch) for launch in optimizer._launches] == [TritonLaunch]
    for model, masks in models:
        assert_invariant(model, masks)
    models.clear()
    # Steps change an element by 0.006; rounded factors change the second or third digit of that.
    tolerance = {"bfloat16": 1e-3, "tf32": 1e-4}.get(options.get("products", ""), 1e-6)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-6, atol=tolerance)
        momentum, twin = optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"]
        assert float(((momentum.cpu() - twin).abs() <= 1e-6).float().mean()) > 0.999
    if optimizer.grad_norm is not None:
        assert reference.grad_norm is not None
        assert float(optimizer.grad_norm) == pytest.approx(float(reference.grad_norm), rel=1e-6)


class Turns(GeneratedOptimizer):
    """A rule over blocks whose loop has several variables, transposes and numbers."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def rule(self, group: Any) -> Rule:
        m, x, y = (sp.MatrixSymbol(name, height, width) for name in "MXY")
        size = sp.Symbol("size", real=True)
        body = (
            (size, size + sp.sqrt(sp.Trace(y.T * y))),
            (y, (m + x * y.T * G) / size),
            (m, x),
            (x, y - x),
        )
        return Rule("Turns", ((x, G), (y, P), (size, height), Repeat(3, body), (P, P - x)), ((m, "m"),), ())


@needs_triton
def test_a_loop_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for launch, device in ((launches.CpuLaunch, "cpu"), (TritonLaunch, DEVICE)):
        monkeypatch.setattr(launches, "CpuLaunch", launch)
        torch.manual_seed(0)
        blocks = nn.Parameter(torch.randn(2, 20, 20).to(device))
        optimizer = Turns([blocks])
        for _ in range(2):
            blocks.grad = torch.randn(2, 20, 20).to(device)
            optimizer.step()
        ends.append(blocks.detach().cpu())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


class Young(GeneratedOptimizer):
    """A rule over blocks that reads the number of the step."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, **options: Any) -> None:
        super().__init__(parameters, {"lr": lr}, **options)

    def rule(self, group: Any) -> Rule:
        m, (lr, norm) = sp.MatrixSymbol("M", height, width), sp.symbols("lr norm", real=True)
        share = 1 / (1 - sp.Float(0.9) ** t)
        equations = ((m, m + (G - m) / t), (norm, sp.sqrt(sp.Trace(m.T * m))), (P, P - lr * share / norm * m))
        return Rule("Young", equations, ((m, "m"),), ((lr, "lr"),))


def with_moves(
    device: str, kind: type[GeneratedOptimizer], options: dict[str, Any]
) -> tuple[list[nn.Parameter], GeneratedOptimizer]:
    """Six steps. The blocks of weights, and of a parameter without a weight, move after the second and the fourth."""
    torch.manual_seed(7)
    model = Mixed()
    masks = random_masks(model, WEIGHTS, 16, 0.6)
    model.to(device)
    masks = Masks(masks, model=model)
    models.append((model, masks))
    # Tiles begin and end inside of these blocks, and one of them holds several.
    moving = [*masks.parameters(), *(nn.Parameter(torch.randn(9, b, b).to(device)) for b in (24, 80))]
    others = [] if kind is Young else [model.bias, model.norm]
    optimizer = kind([*moving, *others], lr=0.01, **options)
    for turn in range(6):
        if turn in (2, 4):
            # The last blocks stay at first.
            for blocks in moving[: len(moving) - (turn == 2)]:
                order = torch.randperm(len(blocks))
                optimizer.move_state(blocks, torch.where(torch.rand(len(blocks)) < 0.4, -1, order), "intersection")
        for blocks in (*moving, *others):
            blocks.grad = torch.randn(blocks.shape).to(blocks)
        optimizer.step()
    return [*moving, *others], optimizer


@needs_triton
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"weight_decay": 0.1, "max_grad_norm": 1.0}),
        (Adam, {"state_dtype": torch.bfloat16, "seed": 3}),
        (SGD, {"momentum": 0.9, "dampening": 0.5}),
        (Young, {}),
        (Young, {"state_dtype": torch.bfloat16}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "plain",
)
def test_blocks_that_move_are_stepped_as_by_the_cpu(
    kind: type[GeneratedOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, reference = with_moves("cpu", kind, options)
    monkeypatch.setattr(launches, "CpuLaunch", TritonLaunch)
    found, optimizer = with_moves(DEVICE, kind, options)
    (launch,) = optimizer._launches
    assert isinstance(launch, TritonLaunch)
    assert launch.table.has_ages
    for model, masks in models:
        assert_invariant(model, masks)
    models.clear()
    for mine, other in zip(found, wanted, strict=True):
        tolerance = 8e-3 if mine.dtype == torch.bfloat16 else 1e-6
        for name, value in {"parameter": other.detach(), **reference.state[other]}.items():
            of_triton = mine.detach() if name == "parameter" else optimizer.state[mine][name]
            same = (of_triton.cpu().float() - value.float()).abs() <= tolerance * max(1.0, float(value.abs().max()))
            # Stochastic rounding turns on the last bit now and then.
            assert bool(same.all()) or ("state_dtype" in options and float(same.float().mean()) > 0.999), name


@needs_triton
@pytest.mark.parametrize("b", [24, 80])
def test_tiles_begin_in_the_middle_of_blocks(b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert b * b % TILE and TILE % (b * b)
    weights = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = nn.Linear(170, 200, bias=False).to(device, torch.bfloat16)
        masks = Masks(random_masks(model, ["weight"], b, 0.5), model=model)
        if weights:
            monkeypatch.setattr(launches, "CpuLaunch", TritonLaunch)
        optimizer = SGD(masks.parameters(), lr=0.1)
        for blocks in masks.parameters():
            blocks.grad = torch.randn(blocks.shape).to(blocks)
        optimizer.step()
        assert_invariant(model, masks)
        weights.append(model.weight.detach().cpu())
    # One rounding apart at most: the C++ compiler may fuse a product and a sum.
    torch.testing.assert_close(*weights, rtol=8e-3, atol=1e-6)


@needs_triton
def test_a_step_with_infinity_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "CpuLaunch", TritonLaunch)
    parameter = nn.Parameter(torch.randn(5000, device=DEVICE))
    optimizer = AdamW([parameter], nonfinite="skip")
    for bad, steps in ((False, 1), (True, 1), (False, 2)):
        parameter.grad = torch.randn_like(parameter)
        if bad:
            parameter.grad[4321] = torch.inf
        before = copy.deepcopy([parameter, optimizer.state_dict()["state"]])
        optimizer.step()
        assert float(optimizer.state[parameter]["step"]) == steps
        after = [parameter, optimizer.state_dict()["state"]]
        if bad:
            torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
        else:
            assert not torch.equal(parameter, before[0])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("products", "side", "ages"),
    [("tf32x3", 16, False), ("tf32x3", 128, False), ("bfloat16", 64, False), ("tf32x3", 16, True)],
)
def test_blocks_compile_for_a_gpu_that_is_not_here(products: str, side: int, ages: bool) -> None:
    rule = rules.muon(nesterov=True, ns_steps=5, scaled=True)
    if ages:
        rule = Young([nn.Parameter(torch.ones(1, 8, 8))], 0.1).rule({})
    kernel = _import(triton_source(launches.lowered(rule))).step_kernel
    signature = dict.fromkeys(("table_", "gradients_", "tiles_"), "*i64")
    signature |= dict.fromkeys(("hyper_", "scale_", "skip_"), "*fp64")
    signature |= {"seed_": "i64", "SIDE_": "constexpr", "PRODUCTS_": "constexpr", "AGES_": "constexpr"}
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {"SIDE_": side, "PRODUCTS_": products, "AGES_": ages})
    options = {"num_warps": warps_for(side)}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "cubin" in compiled.asm
    # What a program may use on the smallest GPUs with TF32.
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("ages", [False, True], ids=["as old as the parameter", "blocks that moved"])
@pytest.mark.parametrize("seed", [1, None], ids=["constant seed", "any seed"])
def test_compiles_for_a_gpu_that_is_not_here(seed: int | None, ages: bool) -> None:
    kernel = _import(triton_source(lower(rules.adam(decoupled=True)))).step_kernel
    signature = dict.fromkeys(("table_", "gradients_", "tiles_"), "*i64")
    signature |= dict.fromkeys(("hyper_", "scale_", "skip_"), "*fp64")
    signature |= {"seed_": "i64" if seed is None else "constexpr", "TILE_": "constexpr", "AGES_": "constexpr"}
    signature = {name: signature[name] for name in kernel.arg_names}
    constants = {"TILE_": TILE, "AGES_": ages} | ({} if seed is None else {"seed_": seed})
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert "cubin" in compiled.asm
