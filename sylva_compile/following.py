"""What happens each time before a compiled graph runs: its sites are found, checked and brought to agree."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sylva_compile import embedding
from sylva_compile.embedded_weight import EmbeddedWeight
from sylva_compile.passes.sample_weight_gradients import Outcome
from sylva_compile.site import Site, iter_sites


@dataclass(frozen=True)
class _Known:
    """What was found for certain arguments; weak, so that nothing is kept alive."""

    arguments: list[weakref.ref[Tensor]]
    sites: list[weakref.ref[Site]]
    trained: list[weakref.ref[Site]]

    def is_alive(self) -> bool:
        """Whether these arguments can be given again."""
        return all(ref() is not None for ref in self.arguments)

    def holds(self, arguments: list[Tensor]) -> bool:
        """Whether these are the same tensors, not others at their addresses, with the same sites."""
        weights = {id(tensor) for tensor in arguments}
        return all(ref() is tensor for ref, tensor in zip(self.arguments, arguments, strict=True)) and all(
            # One that is there may have been given another weight since, and its old one may be another site's.
            (site := ref()) is not None and site.embedded and id(site.weight) in weights
            for ref in self.sites
        )


class Follower:
    """Follows the sites of one compiled graph.

    A graph may serve several layers, and weights are found by identity among the arguments of real calls, never among
    the examples: those may be fake, as are the calls with which DistributedDataParallel's splitter looks for shapes.
    """

    def __init__(self, marked: Sequence[tuple[int, Outcome]], note: Callable[[Site, Outcome], None]) -> None:
        """Of the graph in which `marked` inputs are positions of blocks; `note` is told what first runs with it."""
        self._marked, self._note = marked, note
        self._where: list[int] | None = None
        self._known: dict[tuple[int, ...], _Known] = {}
        self._embedded = -1

    def before_run(self, args: tuple[Any, ...]) -> None:
        """Let the blocks and dense weights among `args` agree.

        Raises:
            EmbeddingError: gradients would be lost, because the weight or the blocks of a site are not the site's, or
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
        if self._embedded != Site.made:
            # What was an ordinary weight may be a site's now.
            self._known.clear()
            self._embedded = Site.made
        arguments = [args[at] for at in self._where]
        key = tuple(map(id, arguments))
        known = self._known.get(key)
        if known is None or not known.holds(arguments):
            # Parameters that are made for one call (an average, to be evaluated) leave nothing behind.
            self._known = {key: known for key, known in self._known.items() if known.is_alive()}
            known = self._known[key] = self._look(args, arguments)
        for ref in known.trained:
            if (site := ref()) is not None:
                embedding.check_reduced(site)
        for ref in known.sites:
            if (site := ref()) is not None:
                site.sync()

    def _look(self, args: tuple[Any, ...], arguments: list[Tensor]) -> _Known:
        by_weight = {id(site.weight): site for site in iter_sites()}
        by_positions = {id(site.layout.positions): site for site in iter_sites()}
        given = {id(value) for value in args}
        trained = []
        for at, outcome in self._marked:
            site = by_positions.get(id(args[at]))
            if site is not None:
                if not {id(site.weight), id(site.blocks)} <= given:
                    raise embedding.swapped(site)
                embedding.check_reduced(site)
                self._note(site, outcome)
                trained.append(weakref.ref(site))
        sites = [weakref.ref(by_weight[id(value)]) for value in arguments if id(value) in by_weight]
        return _Known([weakref.ref(value) for value in arguments], sites, trained)


def _may_be_embedded(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and not isinstance(value, EmbeddedWeight)
