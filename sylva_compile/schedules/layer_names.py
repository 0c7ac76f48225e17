"""The layers of a model: found in the names of the masked weights, or named by the user."""

import logging
from collections.abc import Collection, Iterable, Mapping

from sylva_compile.errors import ArgumentError

log = logging.getLogger(__name__)

Layers = Mapping[str, Iterable[str]] | Iterable[Iterable[str]]


def find_layers(weights: Collection[str]) -> dict[str, list[str]]:
    """Return the weights of each member of one list of modules, in the order of the list.

    Names count the members of a list: "model.layers.3.mlp.up_proj.weight". Of several lists the one with the most
    weights is taken, and of equal ones the outer one. A warning names a weight of a list that is left out.

    Args:
        weights: the names of weights.

    Raises:
        ArgumentError: no list has two members.
    """
    lists: dict[str, dict[str, list[str]]] = {}
    for name in weights:
        parts = name.split(".")
        # The last part is a parameter, not a member of a list of modules.
        for at, part in enumerate(parts[:-1]):
            if part.isdecimal():
                members = lists.setdefault(".".join(parts[:at]), {})
                members.setdefault(".".join(parts[: at + 1]), []).append(name)
    inside = {prefix: set().union(*members.values()) for prefix, members in lists.items() if len(members) > 1}
    if not inside:
        raise ArgumentError("No two masked weights lie in layers of one list; name layers by layers=[[...], [...]].")
    chosen = max(inside, key=lambda prefix: len(inside[prefix]))
    if left_out := set().union(*inside.values()) - inside[chosen]:
        log.warning(
            "%d masked weights lie in other lists of modules than %r, %s first, and are trained at every step; name "
            "the layers by layers=... to draw those too.",
            len(left_out),
            chosen,
            min(left_out),
        )
    return {layer: lists[chosen][layer] for layer in sorted(lists[chosen], key=_number)}


def name_layers(layers: Layers, weights: Collection[str]) -> dict[str, list[str]]:
    """Return `layers` as lists of weight names by layer; lists without names are numbered.

    Raises:
        ArgumentError: there are fewer than two layers, a layer is empty, a name is not among `weights`, or a weight is
            in two layers.
    """
    pairs = layers.items() if isinstance(layers, Mapping) else enumerate(layers)
    found = {str(layer): list(names) for layer, names in pairs}
    if len(found) < 2:
        raise ArgumentError(f"layers names {len(found)} layer; a schedule draws from two or more.")
    owner: dict[str, str] = {}
    for layer, names in found.items():
        if not names:
            raise ArgumentError(f"Layer {layer!r} has no weights; leave it out of layers.")
        for name in names:
            if name not in weights:
                raise ArgumentError(f"The masks have no weight {name!r}; name weights as in list(masks).")
            if name in owner:
                raise ArgumentError(f"{name} is in the layers {owner[name]!r} and {layer!r}; name it once.")
            owner[name] = layer
    return found


def _number(layer: str) -> int:
    return int(layer.rpartition(".")[2])
