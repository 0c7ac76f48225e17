"""`BaseValues`: shows the values from before training in dense weights, and puts the trained ones back.

Both happen in place and touch the trained places alone; blocks keep their values all the time. Autograd counts the
writes into a tensor to refuse a backward pass that would use other values than its forward pass did:

| time               | values  | autograd's count                      | a graph that was recorded ...               |
| ------------------ | ------- | ------------------------------------- | ------------------------------------------- |
| before             | trained | as it was                             |                                             |
| while the base     | base    | a number that no other such time has  | before is refused now                       |
| afterwards         | trained | as it was before                      | before works; while the base showed does not |
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sylva_compile._torch import set_version
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.quantised_state import QuantisedState
from sylva_compile.blocks.shards import local, put
from sylva_compile.errors import EmbedError

_FIRST, _APART = 1 << 31, 64
"""Training does not write a tensor 2³¹ times. Edits while the base shows count on from its number."""
_times = itertools.count()


class _Shown(NamedTuple):
    """A tensor that shows its base: how often it was written before, and what puts the trained values back."""

    tensor: Tensor
    version: int
    put_back: Callable[[], None]
    state: BlockState | None


class BaseValues:
    """The tensors that show their values from before training."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._number = _FIRST + next(_times) * _APART % _FIRST
        self._shown: list[_Shown] = []

    def show_weight(self, state: BlockState) -> None:
        """Let the dense weight of `state` hold its base; it is synced, and its base known."""
        if isinstance(state, QuantisedState):
            self._show_quantised(state)
            return
        originals = state.originals
        copier, base = originals.copier(state.weight), originals.values
        trained = copier.read()
        self._show(state.weight, lambda: copier.write(base.to(trained.device)), lambda: copier.write(trained), state)
        state.disabled = self._number
        state.mark_synced()

    def _show_quantised(self, state: QuantisedState) -> None:
        """Let what passes write into the base hold the values of the base."""
        places = state.mask.positions, state.left.positions.cpu()
        for tensor, at in zip((state.blocks, state.left.values), places, strict=True):
            held, base = tensor.detach(), state.originals.at(at)
            trained = held.clone()
            self._show(tensor, partial(_copy, held, base), partial(_copy, held, trained), _owner(tensor, state))
        state.disabled = self._number

    def show_tensor(self, tensor: Tensor, base: Tensor) -> None:
        """Let `tensor`, which carries no blocks, hold `base`, a tensor of its shape on any device."""
        held = local(tensor).detach()
        trained = held.clone()
        self._show(tensor, lambda: put(tensor, base), lambda: _copy(held, trained), None)

    def _show(
        self, tensor: Tensor, show: Callable[[], None], put_back: Callable[[], None], state: BlockState | None
    ) -> None:
        # Noted first: a write that fails half-way is put back with the others.
        self._shown.append(_Shown(tensor, tensor._version, put_back, state))
        try:
            show()
        finally:
            set_version(tensor, self._number)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.inference_mode(False)
    def put_back(self, *, check: bool = True) -> None:
        """Put the trained values back, bit for bit.

        Args:
            check: whether to raise an error for edits; not while another error is on its way.

        Raises:
            EmbedError: a parameter was edited while it showed its base. Everything is put back nevertheless, and the
                base of a weight with blocks is not known any more.
        """
        edited = []
        for tensor, version, put_back, state in reversed(self._shown):
            changed = tensor._version != self._number
            put_back()
            if not changed:
                set_version(tensor, version)
            elif isinstance(tensor, nn.Parameter):
                # Not a buffer: a forward pass in training mode updates running statistics.
                edited.append("a tensor that an adapter replaced" if state is None else state.name)
            if state is not None:
                state.disabled = 0
                state.base_known &= not changed
                state.mark_weight_written()
        self._shown.clear()
        if edited and check:
            raise EmbedError(
                f"{edited[0]} was changed inside of disable_adapter, and the change is lost where there was something "
                "trained; change weights outside of it."
            )


def _owner(tensor: Tensor, state: BlockState) -> BlockState | None:
    return state if tensor is state.blocks else None


@torch.no_grad()
def _copy(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)
