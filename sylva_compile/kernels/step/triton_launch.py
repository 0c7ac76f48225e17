"""The optimizer step on a GPU: one launch of a generated Triton kernel over the tiles of all parameters.

A step does not wait for the device. It reads values that change from step to step (counts, learning rates held in
tensors, the scale, the skip flag) on the device, so that a CUDA graph can capture it after a few steps have made the
states and tables. This module does not import Triton; the generated module does.
"""

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sylva_compile.kernels.build.code_cache import cached
from sylva_compile.kernels.devices import current
from sylva_compile.kernels.step.codegen import table_width, triton_source
from sylva_compile.kernels.step.lowering import Program
from sylva_compile.kernels.step.matrix_program import MatrixProgram
from sylva_compile.kernels.step.table import Products, Slot, StepTable

TILE = 4096
"""Elements a tile, which one program steps."""


class TritonLaunch:
    """A `Launch` that runs a generated Triton kernel."""

    writes_by_address = True

    def __init__(
        self,
        program: Program | MatrixProgram,
        device: torch.device,
        *,
        stochastic: bool,
        products: Products = "float32",
    ) -> None:
        """Import the generated module; Triton compiles its kernels for the device when they first run there."""
        self.device = device
        self._over_blocks = program.rule.is_over_blocks
        # A program steps one block by a rule over blocks.
        tile = 1 if self._over_blocks else TILE
        self.table = StepTable(
            device, tile, whole_blocks=self._over_blocks, stochastic=stochastic, over_blocks=self._over_blocks
        )
        self._products = _precision(products, device)
        self._width = table_width(program.rule)
        self._module = _import(triton_source(program))
        self._counts: list[Tensor] = []

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Describe this step; see `Launch`."""
        self.table.describe(slots, gradients)
        pairs = zip(slots, gradients, strict=True)
        self._counts = [slot.step for slot, gradient in pairs if gradient is not None and slot.step is not None]

    def squares(self) -> Tensor:
        """Return one sum of squares a tile; see `Launch`."""
        table = self.table
        sums = torch.empty(len(table.tiles), dtype=torch.float64, device=self.device)
        if len(sums):
            tile = _power_of_two(table.largest_block**2) if self._over_blocks else TILE
            options = {"WIDTH": self._width, "TILE": tile, "BLOCKS_ALONE": self._over_blocks}
            with current(self.device):
                self._module.parts.squares_kernel[(len(sums),)](
                    table.rows, table.gradients, table.tiles, sums, **options, num_warps=8
                )
        return sums

    def step(self, hyper: Tensor, scale: Tensor, skip: Tensor, seed: int) -> None:
        """Step every parameter; see `Launch`."""
        table = self.table
        if self._counts:
            torch._foreach_add_(self._counts, (skip == 0).to(torch.float32))
        if len(table.tiles):
            options: dict[str, Any] = {"TILE_": TILE, "num_warps": 8}
            if self._over_blocks:
                # `tl.dot` takes powers of two from 16 on.
                side = max(16, _power_of_two(table.largest_block))
                options = {"SIDE_": side, "PRODUCTS_": self._products, "num_warps": warps_for(side)}
            options["AGES_"] = table.has_ages
            with current(self.device):
                self._module.step_kernel[(len(table.tiles),)](
                    table.rows, table.gradients, hyper, table.tiles, scale, skip, seed, **options
                )


def warps_for(side: int) -> int:
    """Return the number of warps of a program that holds matrices of `side` x `side`."""
    return 8 if side > 64 else 4


def _precision(products: Products, device: torch.device) -> str:
    """Return the name for `tl.dot` of a precision of products.

    float32 products take three of TF32 each, where the device has them: the sum of the factors' upper and lower parts
    is as exact, and compiles in seconds where products of plain float32 are unrolled and take minutes.
    """
    if products == "float32":
        new = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
        return "tf32x3" if new else "ieee"
    return products


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is not below `least`, which is positive."""
    return 1 << (least - 1).bit_length()


def _import(source: str) -> ModuleType:
    """Import `source` from a file, whose text Triton reads; the file's name in the cache depends on all of `source`."""
    path = cached("triton\0" + source, ".py", source.encode)
    name = f"_sylva_compile_{path.name.partition('.')[0]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
