"""What happens each time before a compiled graph runs: its sites are found, checked and brought to agree."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sylva_compile.blocks import embedding
from sylva_compile.blocks.embedded_weight import EmbeddedWeight
from sylva_compile.blocks.site import BlockState, live_states
from sylva_compile.passes.sample_weight_gradients import RewriteResult


@dataclass(frozen=True)
class _Known:
    """The sites of certain arguments, and those of them whose blocks get a gradient."""

    sites: "weakref.WeakSet[BlockState]"
    trained: "weakref.WeakSet[BlockState]"


class RuntimeWrapper:
    """Follows the sites of one compiled graph.

    A graph may serve several layers, and weights are found by identity among the arguments of real calls, never among
    the examples: those may be fake, as are the calls with which DistributedDataParallel's splitter looks for shapes.
    """

    def __init__(
        self, marked: Sequence[tuple[int, RewriteResult]], note: Callable[[BlockState, RewriteResult], None]
    ) -> None:
        """Of the graph in which `marked` inputs are positions of blocks; `note` is told what first runs with it."""
        self._marked, self._note = marked, note
        self._where: list[int] | None = None
        self._known: dict[tuple[int, ...], _Known] = {}
        self._changes = -1

    def before_run(self, args: tuple[Any, ...]) -> None:
        """Let the blocks and dense weights among `args` agree.

        Raises:
            EmbedError: gradients would be lost, because the weight or the blocks of a site are not the site's, or
                because DistributedDataParallel does not average them.
        """
        if self._where is None:
            if any(isinstance(value, FakeTensor) for value in args):
                return
            # Which arguments are Parameters, Dynamo's guards keep alike from call to call; whose they are, they do not.
            positions = {at for at, _ in self._marked}
            self._where = [at for at, value in enumerate(args) if at in positions or _may_be_embedded(value)]
        if not self._where:
            return
        if self._changes != BlockState.changes or len(self._known) > _MOST_KNOWN:
            self._known.clear()
            self._changes = BlockState.changes
        key = tuple(id(args[at]) for at in self._where)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._look(args)
        embedding.check_reduced(known.trained)
        for site in known.sites:
            site.sync()

    def _look(self, args: tuple[Any, ...]) -> _Known:
        by_weight = {id(site.weight): site for site in live_states()}
        by_positions = {id(site.layout.positions): site for site in live_states()}
        given = {id(value) for value in args}
        trained: weakref.WeakSet[BlockState] = weakref.WeakSet()
        for at, outcome in self._marked:
            site = by_positions.get(id(args[at]))
            if site is not None:
                if not {id(site.weight), id(site.blocks)} <= given:
                    raise embedding.swapped(site)
                embedding.check_reduced([site])
                self._note(site, outcome)
                trained.add(site)
        return _Known(weakref.WeakSet(by_weight[each] for each in given & by_weight.keys()), trained)


_MOST_KNOWN = 256
"""Parameters that are made for one call (an average, to be evaluated) leave an entry behind."""


def _may_be_embedded(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and not isinstance(value, EmbeddedWeight)
