"""Input factors `A = Σ x xᵀ`, one for all weights that read the same inputs: q, k and v; gate and up.

`InputFactors` finds out from each batch, not from the model's code, which weights share a factor. Two weights share one
as long as every batch shows both the same tensor with the same live tokens. From the first batch in which they differ,
each goes on with a copy of its own. So a factor always equals the sum that its weight would have gathered alone (up to
the order of sums): in a last layer only the classified token reaches q, all tokens reach k and v, and their factors
differ.

Two inputs count as the same if their address in memory, layout and version agree. That is safe because `InputFactors`
holds a tensor from the moment its first reader shows it until its factor is updated, so that no other layer's inputs
can take over its memory meanwhile. The factor is updated when all its readers have shown the tensor, or at the end of
the batch. Up to then the backward pass keeps the tensor for the later of these readers in any case.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_object, get_world_size

from sylva_compile.curvature.factor import Factor, NewFactor
from sylva_compile.errors import TraceError


@dataclass(frozen=True, eq=False)
class _Shown:
    """Inputs `[T, n]` of this batch whose factor is not updated yet, their live tokens `bool[T]` and their readers."""

    inputs: Tensor
    live: Tensor
    version: int
    readers: list[str] = field(default_factory=list)

    def is_same(self, inputs: Tensor, live: Tensor) -> bool:
        """Whether `inputs` is the tensor held, not changed since, and `live` equals its live tokens."""
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
    """The input factors of many weights, called readers here; readers with equal factors share one."""

    def __init__(self, new_factor: NewFactor) -> None:
        """Start without readers; `new_factor` makes their factors."""
        self.new_factor = new_factor
        self._readers: dict[str, tuple[int, torch.dtype, torch.device]] = {}
        self._factors: dict[str, Factor] = {}
        self._shown: list[_Shown] = []

    def register(self, reader: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Add a reader of inputs `[T, size]`, whose factor is kept in `dtype` on `device`."""
        self._readers[reader] = (size, dtype, device)

    def show(self, reader: str, inputs: Tensor, live: Tensor) -> None:
        """Add the live tokens of one batch to the reader's factor, now or before the batch ends.

        Args:
            reader: a registered reader.
            inputs: `[T, n]`; not to be changed before the batch ends.
            live: tokens to add, `bool[T]`.
        """
        for shown in self._shown:
            if reader not in shown.readers and shown.is_same(inputs, live):
                shown.readers.append(reader)
                break
        else:
            shown = _Shown(inputs, live, inputs._version, [reader])
            self._shown.append(shown)
        factor = self._factors.get(reader)
        if factor is not None and len(shown.readers) == len(self._sharers(factor)):
            # Compare by identity: `==` of these dataclasses would compare tensors.
            self._shown = [other for other in self._shown if other is not shown]
            self._apply(shown)

    def end_batch(self) -> None:
        """Update every factor whose inputs are still held; the caller calls this after each backward pass.

        Raises:
            TraceError: an operation in place changed the held inputs.
        """
        shown, self._shown = self._shown, []
        for one in shown:
            self._apply(one)

    def factor(self, reader: str) -> Factor:
        """Return the reader's factor, a sum over tokens; callers read it and do not change it."""
        self.end_batch()
        if reader not in self._factors:
            self._factors[reader] = self._zero(reader)
        return self._factors[reader]

    def forget(self, reader: str) -> None:
        """Drop a reader; its factor is freed with the last reader that shares it."""
        self._readers.pop(reader, None)
        self._factors.pop(reader, None)

    def groups(self) -> list[list[str]]:
        """Return the readers grouped by shared factor, in order of registration, without readers not shown yet."""
        self.end_batch()
        found: dict[int, list[str]] = {}
        for reader in self._readers:
            if reader in self._factors:
                found.setdefault(id(self._factors[reader]), []).append(reader)
        return list(found.values())

    def regroup(self, groups: list[list[str]]) -> None:
        """Start again from zero, with one shared factor for each of these groups of readers."""
        self._shown.clear()
        self._factors.clear()
        for readers in groups:
            self._own(readers)

    @property
    def nbytes(self) -> int:
        """Size of all factors in bytes, each shared factor counted once."""
        return sum({id(factor): factor.nbytes for factor in self._factors.values()}.values())

    def combine(self, group: ProcessGroup) -> None:
        """Replace each factor by its total over all ranks of `group`; readers that differ on any rank share none."""
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
        """Return one factor for `readers` alone: new, the one that they share, or a copy if others share it too."""
        factor = self._factors.get(readers[0])
        if factor is None:
            factor = self._zero(readers[0])
        elif len(self._sharers(factor)) > len(readers):
            factor = factor.copy()
        self._factors.update(dict.fromkeys(readers, factor))
        return factor

    def _apply(self, shown: _Shown) -> None:
        """Add the live tokens of `shown` to its readers' factors; readers that shared a factor go on sharing."""
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
