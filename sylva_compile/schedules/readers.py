"""Weights that may read one activation, told by their names and shapes."""

from collections.abc import Mapping
from typing import Any

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.scope import layer_numbers


def groups_of_readers(states: Mapping[str, BlockState]) -> dict[tuple[Any, ...], list[str]]:
    """Return the names of weights that may read one activation: those of one layer with one input width."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, state in states.items():
        groups.setdefault((layer_numbers(name), state.layout.width, state.mask.block_size), []).append(name)
    return groups
