"""The choice of the kernel that steps a parameter, and the launches that an optimizer keeps between steps."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.step.cpu import CpuLaunch
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.kernels.step.lowering import Program, Rule, lower
from sylva_compile.kernels.step.matrix_lowering import lower_matrices
from sylva_compile.kernels.step.matrix_program import MatrixProgram
from sylva_compile.kernels.step.table import Launch, Products, Slot, send
from sylva_compile.kernels.step.triton_launch import TritonLaunch
from sylva_compile.optim.state import lies_dense

log = logging.getLogger(__name__)

LARGEST_BLOCK_ON_GPU = 128
"""The size of the largest block that a program of a GPU can hold as a matrix."""


@functools.cache
def lowered(rule: Rule) -> Program | MatrixProgram:
    """Return the lowered rule; each rule is lowered once."""
    return lower_matrices(rule) if rule.is_over_blocks else lower(rule)


class Launches:
    """The launches of one optimizer. Each is made when it is first needed and kept with its tables."""

    def __init__(self, *, stochastic: bool, products: Products = "float32") -> None:
        """Make no launch yet.

        Args:
            stochastic: round bfloat16 states stochastically.
            products: the precision of matrix products' factors.
        """
        self._options: dict[str, Any] = {"stochastic": stochastic, "products": products}
        self._made: dict[Rule, dict[tuple[torch.device, type[Launch], bool], Launch]] = {}
        self._hyper: dict[tuple[Rule, torch.device], tuple[list[float | None], Tensor]] = {}

    def by(self, rule: Rule) -> Callable[[Slot, Tensor | None, bool], Launch]:
        """Return a function that maps a parameter's slot and gradient to the launch that steps them by `rule`.

        Parameters of which each process holds a part, the last argument, have launches of their own: the sums of
        squares of these are added over processes.

        Hashing a rule takes long, so call this once a parameter group and not once a parameter.
        """
        made = self._made.setdefault(rule, {})
        over_blocks = rule.is_over_blocks

        def launch(slot: Slot, gradient: Tensor | None, sharded: bool) -> Launch:
            device = slot.param.device
            key = (device, _kind(slot, gradient, over_blocks), sharded)
            if key not in made:
                made[key] = _make(key[1], lowered(rule), device, **self._options)
            return made[key]

        return launch

    def __iter__(self) -> Iterator[Launch]:
        return (launch for made in self._made.values() for launch in made.values())

    def hyperparameters(self, rule: Rule, groups: Sequence[Mapping[str, Any] | None], device: torch.device) -> Tensor:
        """Return the rule's hyperparameters of all groups, `float64[groups, hyperparameters]` on `device`.

        None stands for a group of another rule, and gets zeros. Tensors on a GPU are copied on the device, without
        waiting for it.
        """
        names = [name for _, name in rule.hyperparameters]
        found = [0.0 if group is None else _read(group, name) for group in groups for name in names]
        remote = {k: value for k, value in enumerate(found) if isinstance(value, Tensor) and value.is_cuda}
        # None stands for a tensor on a GPU: 0.0 would hide that a number 0.0 has taken its place.
        values = [None if k in remote else float(value) for k, value in enumerate(found)]
        before, table = self._hyper.get((rule, device), (None, torch.empty(0)))
        if values != before:
            known = torch.tensor([value or 0.0 for value in values], dtype=torch.float64, device="cpu")
            table = send(known.view(len(groups), len(names)), device)
            self._hyper[rule, device] = (values, table)
        for k, value in remote.items():
            table[k // len(names), k % len(names)] = value.reshape(())
        return table


def _read(group: Mapping[str, Any], name: str | tuple[str, int]) -> Any:
    return group[name] if isinstance(name, str) else group[name[0]][name[1]]


def _kind(slot: Slot, gradient: Tensor | None, over_blocks: bool) -> type[Launch]:
    # Kernels that look at blocks take the rows of a block one after another.
    by_blocks = over_blocks or slot.born is not None
    in_order = slot.param.is_contiguous() if by_blocks else lies_dense(slot.param)
    if not in_order or not (slot.target is None or slot.target.by_address):
        return EagerLaunch
    if slot.param.is_cpu:
        return CpuLaunch
    tensors = (slot.param, *slot.states, *(() if gradient is None else (gradient,)))
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    large = over_blocks and slot.param.shape[-1] > LARGEST_BLOCK_ON_GPU
    return EagerLaunch if wide or large or not slot.param.is_cuda else TritonLaunch


def _make(kind: type[Launch], program: Program | MatrixProgram, device: torch.device, **options: Any) -> Launch:
    if device.type != "cuda":
        options["products"] = "float32"
    if kind is CpuLaunch:
        try:
            return CpuLaunch(program, device, **options)
        except NativeCompilerError as error:
            _log_once(str(error))
            kind = EagerLaunch
    return kind(program, device, **options)  # type: ignore[call-arg]


@functools.cache
def _log_once(reason: str) -> None:
    log.warning("Optimizer steps run in torch's own operations: correct, but slower. %s", reason)
