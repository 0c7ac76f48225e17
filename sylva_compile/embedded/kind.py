"""`Kind`: what the rest of the library asks of a kind of embedded weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sylva_compile.embedded.bound_masks import BoundMasks


def _nothing(model: nn.Module) -> dict[str, str]:
    """Report nothing."""
    return {}


def _no_check(arguments: Iterable[Any]) -> None:
    """Check nothing."""


@dataclass(frozen=True)
class Kind:
    """One kind of embedded weights. `sylva_compile.embedded` says what else a kind has.

    Attributes:
        masks: the class of its masks, which `backend` takes.
        carriers: returns, by weight name, one Parameter of each embedded weight of a model, of every module that holds
            the weight. `compile_layers` finds the layers to compile by them.
        is_carried: whether a tensor changes in training: compilers must make no constant of it.
        unembed: makes an ordinary model of one, in place, with what was trained; a model without such weights stays.
        report: returns, by weight name, what became of each embedded weight of a model, in a line for
            `backend.report()`. That of blocks is a `WeightReport`, which the backend makes.
        check_arguments: called with the arguments of a compiled graph before each of its runs; raises EmbedError where
            gradients would be lost. Blocks need more than arguments: `RuntimeWrapper` looks up their states.
    """

    masks: type[BoundMasks[Any]]
    carriers: Callable[[nn.Module], dict[str, Tensor]]
    is_carried: Callable[[Tensor], bool]
    unembed: Callable[[nn.Module], Any]
    report: Callable[[nn.Module], dict[str, str]] = _nothing
    check_arguments: Callable[[Iterable[Any]], None] = _no_check
