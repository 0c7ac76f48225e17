"""Masks of small quantised models, and the slow twin of such a model: every block copied into a float64 weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.quantised_base import quantised_base

B = 16


def masks_of(model: nn.Module, seed: int = 0, share: float = 0.4) -> Masks:
    """Return random masks of every quantised weight of `model`, bound to it."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for name, weight in model.named_parameters():
        base = quantised_base(model, weight)
        if base is not None:
            m, n = base.shape
            maps[name] = torch.rand(m // B, n // B, generator=generator) < share
            maps[name][0, 0] = True
    return Masks.from_block_maps(model, maps, B)


def shake(masks: Masks, seed: int = 1) -> None:
    """Change every block, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for blocks in masks.parameters():
            blocks += 0.1 * torch.randn(blocks.shape, generator=generator)


def dense64(model: nn.Module) -> dict[str, Tensor]:
    """Return the slow twin of each weight: the base, dequantised, with each block copied in by itself."""
    found = {}
    for name, state in block_states(model).items():
        dense = state.base_weight().double()
        left, values = state.left_behind()
        for (row, col), value in [
            *zip(left.t().tolist(), values, strict=True),
            *zip(state.mask.positions.t().tolist(), state.blocks.detach(), strict=True),
        ]:
            dense[row * B : row * B + B, col * B : col * B + B] = value.double()
        found[name] = dense.requires_grad_(True)
    return found


def expected(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return output, block gradients and input gradient of an MLP in float64."""
    weights, inputs = dense64(model), x.detach().double().requires_grad_(True)
    h = inputs
    for number, (name, weight) in enumerate(weights.items()):
        bias = model.get_submodule(name.removesuffix(".weight")).bias
        h = F.linear(h if number == 0 else F.gelu(h), weight, None if bias is None else bias.detach().double())
    h.square().mean().backward()
    gradients = []
    for name, state in block_states(model).items():
        whole = weights[name].grad
        assert whole is not None
        places = state.mask.positions.t().tolist()
        gradients.append(torch.stack([whole[r * B : r * B + B, c * B : c * B + B] for r, c in places]))
    assert inputs.grad is not None
    return h.detach(), gradients, inputs.grad


def passed(model: Any, run: Any, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the same of the model itself."""
    inputs = x.clone().requires_grad_(True)
    out = run(inputs)
    out.float().square().mean().backward()
    states = block_states(model).values()
    gradients = [state.blocks.grad for state in states]
    for state in states:
        state.blocks.grad = None
    assert inputs.grad is not None
    return out.detach(), gradients, inputs.grad  # type: ignore[return-value]


def assert_close(found: tuple[Any, ...], wanted: tuple[Any, ...], tolerance: float = 2e-5) -> None:
    for mine, theirs in zip([found[0], found[2], *found[1]], [wanted[0], wanted[2], *wanted[1]], strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0
        assert (mine.double() - theirs).abs().max().item() <= tolerance * scale
