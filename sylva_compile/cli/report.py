"""`sylva-compile report`: a page about where training changed the model, and its curves."""

import logging
from pathlib import Path

from sylva_compile.blocks.embed import block_states
from sylva_compile.cli.merge import load_with_adapter
from sylva_compile.cli.models import check_can_be_made
from sylva_compile.cli.options import ReportConfig
from sylva_compile.errors import InputError, ReportError
from sylva_compile.reports.history import History, read_history

log = logging.getLogger(__name__)


def run(options: ReportConfig) -> int:
    """Write the page, and return the exit code.

    Raises:
        InputError: matplotlib is missing, or `out` is a folder or cannot be made.
        ReportError: the log that was named cannot be read, or the page cannot be written.
    """
    try:
        from sylva_compile.reports.page import write_report
    except ImportError as error:
        raise InputError(f"A report needs {error.name}; run `pip install {error.name}`.") from error
    from sylva_compile.reports.changes import changes_of

    # A place where nothing can be written must not come to light after the model is read.
    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; give the name of a file.")
    check_can_be_made(options.out)
    named = None if options.log is None else read_history(options.log)
    _, model = load_with_adapter(options.model, options.adapter)
    settings = next(iter(block_states(model).values())).masks_config
    write_report(options.out, changes_of(model), settings=settings, history=named or _found_beside(options.adapter))
    print(f"report: {options.out}")
    return 0


def _found_beside(adapter: Path) -> History:
    """Return the curves of the training in whose folder the adapter is; one that no Trainer wrote has none."""
    try:
        return read_history(adapter)
    except ReportError as error:
        log.info("The report has no curves: %s", error)
        return History()
