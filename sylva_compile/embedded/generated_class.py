"""`generated_class`: subclasses of a module's own class, made once and kept.

Code that asks for the class of a module, `isinstance(module, nn.Linear)`, gets the answer that it expects.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import nn

_classes: dict[tuple[type, type, Hashable], type] = {}


def generated_class(
    mixin: type, base: type, prefix: str, members: Callable[[], Mapping[str, Any]] = dict, key: Hashable = None
) -> type:
    """Return the subclass of `mixin` and `base`, in this order.

    Args:
        mixin: the members that all such classes share.
        base: the module's own class.
        prefix: stands before the name of `base` in that of the class.
        members: returns further members; called once for each class.
        key: tells apart classes of one `base` whose members differ.
    """
    if (mixin, base, key) not in _classes:
        own = {"__module__": mixin.__module__, **members()}
        _classes[mixin, base, key] = type(f"{prefix}{base.__name__}", (mixin, base), own)
    return _classes[mixin, base, key]


def empty_module(cls: Any) -> nn.Module:
    """Make a module of a generated class without calling `__init__`: a pickle sets its state."""
    module: nn.Module = cls.__new__(cls)
    return module
