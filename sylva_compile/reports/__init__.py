"""Reports of a training: where it changed the weights and how much, its losses, its moves; as pictures and a page.

They need matplotlib: `pip install 'sylva-compile[report]'`.
"""

from sylva_compile.reports.changes import WeightChange, changes_of
from sylva_compile.reports.history import History, history_of, read_history
from sylva_compile.reports.page import write_report
from sylva_compile.reports.pictures import heat_maps

__all__ = ["History", "WeightChange", "changes_of", "heat_maps", "history_of", "read_history", "write_report"]
