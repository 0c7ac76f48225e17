"""Input factors `A = Σ x xᵀ`, one for all weights that read the same inputs: q, k and v; gate and up.

Who shares is never asked of the model but seen in each batch. Two weights share a factor as long as they have been
shown the same tensor with the same live tokens in every batch; from the first batch in which they differ, each goes on
with a copy. So a factor is always exactly what its weight would have gathered alone (up to the order of sums): in a
last layer only the classified token reaches q, all of them reach k and v, and their factors differ.

Inputs are compared while both are alive. A tensor is held from the moment its first reader shows it until its factor
is updated, so its memory cannot be given to another layer's inputs meanwhile, and an address in memory is an identity.
It is held until all readers of its factor have come, or to the end of the batch: never beyond the batch, in which
the backward pass keeps it for the later of these readers in any case.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_object, get_world_size

from sylva_compile.curvature.factor import Factor, NewFactor
from sylva_compile.errors import TraceError


@dataclass(frozen=True, eq=False)
class _Shown:
    """Inputs `[T, n]` of this batch whose factor is not updated yet, and who reads them."""

    inputs: Tensor
    live: Tensor
    version: int
    readers: list[str] = field(default_factory=list)

    def is_same(self, inputs: Tensor, live: Tensor) -> bool:
        """Whether `inputs` is the very tensor held, unchanged, and the same tokens live."""
        held = self.inputs
        return (
            held.data_ptr() == inputs.data_ptr()
            and held.device == inputs.device
            and held.dtype == inputs.dtype
            and held.shape == inputs.shape
            and held.stride() == inputs.stride()
            and self.version == inputs._version
            and torch.equal(self.live, live)
        )


class InputFactors:
    """The input factors of many weights, called readers here; equal ones exist once."""

    def __init__(self, new_factor: NewFactor) -> None:
        """No readers yet; `new_factor` makes their factors."""
        self.new_factor = new_factor
        self._readers: dict[str, tuple[int, torch.dtype, torch.device]] = {}
        self._factors: dict[str, Factor] = {}
        self._shown: list[_Shown] = []

    def register(self, reader: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Announce a reader of inputs of `size` columns, whose factor is kept in `dtype` on `device`."""
        self._readers[reader] = (size, dtype, device)

    def show(self, reader: str, inputs: Tensor, live: Tensor) -> None:
        """Add `inputs [T, n]` of one batch to the reader's factor, without the tokens that `live bool[T]` denies."""
        for shown in self._shown:
            if reader not in shown.readers and shown.is_same(inputs, live):
                shown.readers.append(reader)
                break
        else:
            shown = _Shown(inputs, live, inputs._version, [reader])
            self._shown.append(shown)
        factor = self._factors.get(reader)
        if factor is not None and len(shown.readers) == len(self._sharers(factor)):
            # By identity: comparing dataclasses would compare tensors.
            self._shown = [other for other in self._shown if other is not shown]
            self._apply(shown)

    def end_batch(self) -> None:
        """Update every factor whose inputs are still held; to be called after each backward pass."""
        shown, self._shown = self._shown, []
        for one in shown:
            self._apply(one)

    def factor(self, reader: str) -> Factor:
        """The reader's factor, a sum over tokens; to be read, not changed."""
        self.end_batch()
        if reader not in self._factors:
            self._factors[reader] = self._zero(reader)
        return self._factors[reader]

    def forget(self, reader: str) -> None:
        """Drop a reader; its factor's memory is free when the last one goes."""
        self._readers.pop(reader, None)
        self._factors.pop(reader, None)

    def groups(self) -> list[list[str]]:
        """Readers by the factor they share, in order of registration; without those that have shown nothing yet."""
        self.end_batch()
        found: dict[int, list[str]] = {}
        for reader in self._readers:
            if reader in self._factors:
                found.setdefault(id(self._factors[reader]), []).append(reader)
        return list(found.values())

    def regroup(self, groups: list[list[str]]) -> None:
        """Start again from zero, with these groups of readers sharing a factor each."""
        self._shown.clear()
        self._factors.clear()
        for readers in groups:
            self._own(readers)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, each counted once."""
        return sum({id(factor): factor.nbytes for factor in self._factors.values()}.values())

    def combine(self, group: ProcessGroup) -> None:
        """Add up the factors of all ranks of `group`; what any rank keeps apart is kept apart by all."""
        mine = {reader: readers[0] for readers in self.groups() for reader in readers}
        everyone: list[dict[str, str]] = [{} for _ in range(get_world_size(group))]
        all_gather_object(everyone, mine, group=group)
        apart: dict[tuple[str | None, ...], list[str]] = {}
        for reader in self._readers:
            firsts = tuple(groups.get(reader) for groups in everyone)
            if any(firsts):
                apart.setdefault(firsts, []).append(reader)
        for readers in apart.values():
            self._own(readers).combine(group)

    def _zero(self, reader: str) -> Factor:
        return self.new_factor(*self._readers[reader])

    def _sharers(self, factor: Factor) -> list[str]:
        return [reader for reader, other in self._factors.items() if other is factor]

    def _own(self, readers: list[str]) -> Factor:
        """The factor of `readers`, who share one or have none yet; a copy if others share it too."""
        factor = self._factors.get(readers[0])
        if factor is None:
            factor = self._zero(readers[0])
        elif len(self._sharers(factor)) > len(readers):
            factor = factor.copy()
        self._factors.update(dict.fromkeys(readers, factor))
        return factor

    def _apply(self, shown: _Shown) -> None:
        if shown.inputs._version != shown.version:
            raise TraceError(
                f"The inputs of {shown.readers[0]} changed during the backward pass; use no in-place layers."
            )
        tokens = shown.inputs if bool(shown.live.all()) else shown.inputs[shown.live]
        histories: dict[int, list[str]] = {}
        for reader in shown.readers:
            histories.setdefault(id(self._factors.get(reader)), []).append(reader)
        for readers in histories.values():
            self._own(readers).update(tokens)
