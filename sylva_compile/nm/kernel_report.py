"""The kernels that have multiplied the pruned weights of a model, a line for each weight."""

from typing import Any

from torch import nn

from sylva_compile.kernels.nm.last_choice import last_choice
from sylva_compile.nm.embedding import nm_modules


def kernel_report(model: nn.Module) -> dict[str, str]:
    """Return, by weight name, the pattern and the kernels of the last forward pass and input gradient in this process.

    A kernel is chosen for a shape and a number of tokens, when a product runs: what has not run is not known.
    """
    return {name: _line(module) for name, module in nm_modules(model).items()}


def _line(module: Any) -> str:
    layout, low_rank = module._nm_layout, module._nm_low_rank
    folded = None if low_rank is None else low_rank.folded
    forward = last_choice(layout.codes if folded is None else folded)
    if layout.double:
        back = last_choice(layout.second) if layout.second.shape[1] else None
    else:
        back = last_choice(layout.codes, transposed=True)
    return f"{layout.n}:{layout.m}, forward {forward or 'not run'}, input gradient {back or 'not run'}"
