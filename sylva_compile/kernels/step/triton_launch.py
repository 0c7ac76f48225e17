"""The optimizer step on a GPU: one launch of a generated Triton kernel over the tiles of all parameters.

Nothing in a step waits for the device, and what changes from step to step (counts, learning rates held in tensors, the
scale, whether to skip) is read on the device, so that a step can be captured in a CUDA graph once a few steps have made
the states and tables.
"""

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from sylva_compile.kernels.build.code_cache import cached
from sylva_compile.kernels.devices import current
from sylva_compile.kernels.step.codegen import table_width, triton_source
from sylva_compile.kernels.step.lowering import Program
from sylva_compile.kernels.step.table import Slot, StepTable

TILE = 4096
"""Elements that a program steps."""


class TritonLaunch:
    """A `Launch` of a generated Triton kernel."""

    writes_by_address = True

    def __init__(self, program: Program, device: torch.device, *, stochastic: bool) -> None:
        """Put the source where Triton can read it; it is compiled for the device when it first runs there."""
        self.device = device
        self.table = StepTable(device, TILE, whole_blocks=False, stochastic=stochastic)
        self._width = table_width(program.rule)
        self._module = _import(triton_source(program))
        self._counts: list[Tensor] = []

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """See `Launch`."""
        self.table.describe(slots, gradients)
        pairs = zip(slots, gradients, strict=True)
        self._counts = [slot.step for slot, gradient in pairs if gradient is not None and slot.step is not None]

    def squares(self) -> Tensor:
        """See `Launch`: a sum a tile."""
        table = self.table
        sums = torch.empty(len(table.tiles), dtype=torch.float64, device=self.device)
        if len(sums):
            with current(self.device):
                self._module.parts.squares_kernel[(len(sums),)](
                    table.rows, table.gradients, table.tiles, sums, WIDTH=self._width, TILE=TILE, num_warps=8
                )
        return sums

    def step(self, hyper: Tensor, scale: Tensor, skip: Tensor, seed: int) -> None:
        """See `Launch`."""
        table = self.table
        if self._counts:
            torch._foreach_add_(self._counts, (skip == 0).to(torch.float32))
        if len(table.tiles):
            with current(self.device):
                self._module.step_kernel[(len(table.tiles),)](
                    table.rows, table.gradients, hyper, table.tiles, scale, skip, seed, TILE_=TILE, num_warps=8
                )


def _import(source: str) -> ModuleType:
    """The module of `source`, from a file: Triton reads the text of its functions again."""
    path = cached("triton\0" + source, ".py", source.encode)
    name = f"_sylva_compile_{path.name.partition('.')[0]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
