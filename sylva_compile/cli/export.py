"""`sylva-compile export`: an adapter in a format that other programs read."""

from sylva_compile.adapters.export_shira import export_peft
from sylva_compile.cli import merge
from sylva_compile.cli.models import check_new
from sylva_compile.cli.options import AdapterConfig, ExportConfig
from sylva_compile.errors import UsageError


def run(options: AdapterConfig, export: ExportConfig) -> int:
    """Export, and return the exit code.

    Raises:
        UsageError: `dequantise` is given for an adapter.
    """
    if export.format == "dense":
        return merge.run(options)
    if options.dequantise:
        raise UsageError("--dequantise is for checkpoints; leave it out, or give --format dense.")
    check_new(options.out)
    _, model = merge.load_with_adapter(options.model, options.adapter)
    export_peft(model, options.out)
    print(f"PEFT adapter (SHiRA): {options.out}")
    return 0
