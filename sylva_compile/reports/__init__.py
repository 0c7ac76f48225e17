"""Reports of a training: where it changed the weights and how much, its losses, its moves; as pictures and a page.

Pictures and pages need matplotlib (`pip install matplotlib`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sylva_compile.reports.changes import WeightChange, changes_of
    from sylva_compile.reports.history import History, history_of, read_history
    from sylva_compile.reports.page import write_report
    from sylva_compile.reports.pictures import heat_maps

__all__ = ["History", "WeightChange", "changes_of", "heat_maps", "history_of", "read_history", "write_report"]

_MODULES = {
    "History": "history",
    "WeightChange": "changes",
    "changes_of": "changes",
    "heat_maps": "pictures",
    "history_of": "history",
    "read_history": "history",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sylva_compile.reports.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
