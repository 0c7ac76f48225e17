"""`sylva-compile trace`: choose the blocks of a model and write the masks to a file."""

from dataclasses import replace

import torch
from transformers import set_seed

from sylva_compile.cli.data import load
from sylva_compile.cli.logs import shows_bars
from sylva_compile.cli.models import check_new
from sylva_compile.cli.options import DataConfig, ModelConfig, TraceConfig
from sylva_compile.cli.sequences import batches_of, hold_out
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import InputError, UsageError
from sylva_compile.tracing.trace import trace_and_mask


def run(base: ModelConfig, data: DataConfig, result: TraceConfig, settings: SylvaConfig) -> int:
    """Trace, and return the exit code."""
    if settings.needs_data and data.data is None:
        raise UsageError(f"--data is missing, which --method {settings.method} needs; give a file or a data set.")
    if result.out.is_dir():
        raise InputError(f"--out {result.out} is a folder; give the name of a file.")
    # A place where nothing can be written must not come to light after the trace.
    check_new(result.out)
    set_seed(data.seed)
    model, _, examples = load(base, data)
    batches = None
    if settings.needs_data:
        train, _ = hold_out(examples, data)
        batches = batches_of(train, data.batch_size, settings.num_samples)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        model.to(accelerator)  # type: ignore[arg-type]
    masks = trace_and_mask(model, batches, replace(settings, progress=shows_bars()))
    masks.save(result.out)
    print(masks.summary().splitlines()[-1])
    print(f"masks: {result.out}")
    return 0
