"""`RuntimeWrapper`: finds, checks and syncs the states of a compiled graph's arguments each time before it runs."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sylva_compile._torch import FakeTensor
from sylva_compile.blocks import registry
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import check_averaged
from sylva_compile.blocks.dense_view import DenseView
from sylva_compile.blocks.embedded_module import refuse_moves_before_backward, swapped
from sylva_compile.compiler.kinds import KINDS
from sylva_compile.passes.sample_weight_gradients import RewriteResult

_MOST_KNOWN = 256
"""The most argument lists that a wrapper remembers: Parameters made for one call (averages, say) add one each."""


@dataclass(frozen=True)
class _Known:
    """The states of one list of arguments, and those of them whose blocks get a gradient."""

    states: "weakref.WeakSet[BlockState]"
    trained: "weakref.WeakSet[BlockState]"


class RuntimeWrapper:
    """A compiled graph, wrapped so that blocks and dense weights are equal before it runs.

    One graph may serve several layers, so the wrapper looks among the arguments of every real call. It never looks at
    the example inputs: those may be fake, as are the calls with which DistributedDataParallel's splitter infers shapes.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        results: Sequence[tuple[int, RewriteResult]],
        note: Callable[[BlockState, RewriteResult], None],
        held: Sequence[BlockState] = (),
    ) -> None:
        """Wrap a compiled graph.

        Args:
            compiled: the graph's code.
            results: what became of each weight gradient, with the index of the argument that holds its positions.
            note: called with a state and its result whenever the graph looks up the states of new arguments.
            held: states whose weights are attributes of the graph: with Inductor's freezing they are no arguments.
        """
        self._held = weakref.WeakSet(held) if held else None
        self._compiled, self._results, self._note = compiled, results, note
        self._where: list[int] | None = None
        self._known: dict[tuple[int, ...], _Known] = {}
        self._changes = -1

    def __call__(self, *args: Any) -> Any:
        """Run the graph.

        Raises:
            EmbedError: gradients would be lost, because an argument is not the weight or the blocks of the state that
                its positions belong to, or because DistributedDataParallel does not average the blocks.
        """
        for kind in KINDS:
            kind.check_arguments(args)
        trained = self._before_run(args)
        outputs = self._compiled(*args)
        if trained:
            given = outputs if isinstance(outputs, list | tuple) else [outputs]
            # Most outputs lead to one node, the graph's backward pass; a view of another output has a node of its own.
            nodes = {output.grad_fn: output for output in given if isinstance(output, Tensor) and output.requires_grad}
            for output in nodes.values():
                refuse_moves_before_backward(output, trained)
        return outputs

    def _before_run(self, args: tuple[Any, ...]) -> "Sequence[BlockState]":
        """Check and sync the states of `args`; return those whose blocks get a gradient."""
        if self._held is not None:
            for state in self._held:
                state.sync()
        if self._where is None:
            if any(isinstance(value, FakeTensor) for value in args):
                return ()
            # Guards fix which arguments are Parameters, not which Parameter: one graph serves several layers.
            positions = {at for at, _ in self._results}
            self._where = [at for at, value in enumerate(args) if at in positions or _may_be_embedded(value)]
        if not self._where:
            return ()
        changes = registry.changes()
        if self._changes != changes or len(self._known) > _MOST_KNOWN:
            self._known.clear()
            self._changes = changes
        key = tuple(id(args[at]) for at in self._where)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._look_up(args)
        check_averaged(known.trained)
        for state in known.states:
            state.sync()
        return list(known.trained)

    def _look_up(self, args: tuple[Any, ...]) -> _Known:
        given = {id(value) for value in args}
        trained: weakref.WeakSet[BlockState] = weakref.WeakSet()
        for at, result in self._results:
            state = registry.state_of_positions(args[at])
            if state is not None:
                if not {id(tensor) for tensor in state.graph_inputs} <= given:
                    raise swapped(state)
                check_averaged([state])
                self._note(state, result)
                trained.add(state)
        found = (registry.state_of_weight(value) for value in args)
        return _Known(weakref.WeakSet(state for state in found if state is not None), trained)


def _may_be_embedded(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and not isinstance(value, DenseView)
