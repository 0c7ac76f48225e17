"""The optimizer step on the CPU: one call of a compiled function over the tiles of all parameters."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from sylva_compile.kernels.build import native
from sylva_compile.kernels.step.codegen import cpp_source
from sylva_compile.kernels.step.lowering import Program
from sylva_compile.kernels.step.matrix_program import MatrixProgram
from sylva_compile.kernels.step.table import Products, Slot, StepTable

TILE = 4096
"""Elements a tile: one block of 64 x 64."""

# Without these flags a square root keeps its loop from being vectorised; no code reads errno or floating-point traps.
_FLAGS = ("-fno-math-errno", "-fno-trapping-math")


class CpuLaunch:
    """A `Launch` that calls C++ compiled for this processor."""

    writes_by_address = True

    def __init__(
        self,
        program: Program | MatrixProgram,
        device: torch.device,
        *,
        stochastic: bool,
        products: Products = "float32",
    ) -> None:
        """Compile the program, or load it from the cache; `products` is for GPUs, and of no effect here.

        Raises:
            NativeCompilerError: there is no C++ compiler, or it does not take the program.
        """
        self.device = device
        over_blocks = program.rule.is_over_blocks
        # A rule over blocks steps one block a tile.
        tile = 1 if over_blocks else TILE
        self.table = StepTable(device, tile, whole_blocks=True, stochastic=stochastic, over_blocks=over_blocks)
        self._library = native.load(cpp_source(program), name=f"the step of {program.rule.name}", flags=_FLAGS)
        self._profile_name = f"sylva_compile::step({program.rule.name})"

    def describe(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Describe this step; see `Launch`."""
        self.table.describe(slots, gradients)

    def squares(self) -> Tensor:
        """Return one sum of squares a tile; see `Launch`."""
        table = self.table
        sums = torch.empty(len(table.tiles), dtype=torch.float64, device="cpu")
        self._library.squares(
            _pointer(table.rows),
            _pointer(table.gradients),
            _pointer(table.tiles),
            ctypes.c_int64(len(table.tiles)),
            ctypes.c_int64(table.tile),
            _pointer(sums),
            torch.get_num_threads(),
        )
        return sums

    def step(self, hyper: Tensor, scale: Tensor, skip: Tensor, seed: int) -> None:
        """Step every parameter; see `Launch`."""
        if skip.item():
            return
        table = self.table
        with record_function(self._profile_name):
            self._library.step(
                _pointer(table.rows),
                _pointer(table.gradients),
                ctypes.c_int64(len(table.rows)),
                _pointer(hyper),
                _pointer(table.tiles),
                ctypes.c_int64(len(table.tiles)),
                ctypes.c_int64(table.tile),
                ctypes.c_double(scale.item()),
                ctypes.c_uint32(seed),
                torch.get_num_threads(),
            )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
