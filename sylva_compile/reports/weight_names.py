"""Where in a model its weights are, by their names: in which stack of layers, in which layer, and of which kind."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The place of a weight.

    Attributes:
        stack: where a model has several stacks of layers, the words of the name that tell them apart: "encoder".
        layer: the first number in the name; None without one.
        kind: the name without the layers' numbers and the word "weight", behind the stack: "self_attn.q_proj" or
            "encoder.self_attn.q_proj".
    """

    stack: str
    layer: int | None
    kind: str


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """Return the place of each of the weights `names` of one model."""
    numbers = {name: re.search(r"(?:^|\.)(\d+)\.(.+)$", name) for name in names}
    above = {name: tuple(name[: found.start()].split(".")) for name, found in numbers.items() if found is not None}
    stacks = _told_apart(set(above.values()))
    places = {}
    for name, found in numbers.items():
        words = (name if found is None else found[2]).split(".")
        kind = ".".join(word for word in words if not word.isdecimal()).removesuffix(".weight")
        stack = stacks[above[name]] if name in above else ""
        layer = None if found is None else int(found[1])
        places[name] = Place(stack, layer, f"{stack}.{kind}" if stack else kind)
    return places


def _told_apart(stacks: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return a name for each stack, without the words with which all of them begin or end."""
    if len(stacks) == 1:
        return dict.fromkeys(stacks, "")
    first, last = _shared(stacks), _shared({stack[::-1] for stack in stacks})
    short = {stack: ".".join(stack[first : len(stack) - last]) for stack in stacks}
    return short if len(set(short.values())) == len(stacks) else {stack: ".".join(stack) for stack in stacks}


def _shared(stacks: set[tuple[str, ...]]) -> int:
    """Return the number of words with which all stacks begin."""
    same = (len(set(words)) == 1 for words in zip(*stacks, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))
