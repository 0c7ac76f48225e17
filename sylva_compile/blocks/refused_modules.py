"""Modules that hold a quantised weight in a format that blocks cannot train in, refused by name."""

import logging
from collections.abc import Callable, Iterable

from torch import nn

from sylva_compile.errors import ScopeError
from sylva_compile.quantised.registry import refusal_text, refused_format

log = logging.getLogger(__name__)


def check_no_refused(
    modules: Iterable[tuple[str, nn.Module]], in_scope: Callable[[str], bool] | None, *, found_others: bool
) -> None:
    """Raise ScopeError if the scope names a quantised module in which blocks cannot be trained.

    Args:
        modules: the modules of the model that are no linear layers, by name.
        in_scope: whether the scope names a module; None for "all-linear", which leaves them out with a warning where
            there are others.
        found_others: whether the scope holds linear layers.
    """
    for name, module in modules:
        if any(module.children()) or (kind := refused_format(module)) is None:
            continue
        if in_scope is None and found_others:
            log.warning("%s", refusal_text(name, kind).replace("; ", "; it stays frozen: to train it, ", 1))
            return
        if in_scope is None or in_scope(name):
            raise ScopeError(refusal_text(name, kind))
