"""`sylva-compile trace`: choose the blocks of a model and write the masks to a file."""

from dataclasses import replace

import torch
from transformers import set_seed

from sylva_compile.cli.data import load
from sylva_compile.cli.logs import shows_bars
from sylva_compile.cli.options import DataConfig, ModelConfig, TraceConfig
from sylva_compile.cli.sequences import batches_of, hold_out
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import InputError, UsageError
from sylva_compile.tracing.trace import trace_and_mask


def run(base: ModelConfig, data: DataConfig, result: TraceConfig, settings: SylvaConfig) -> int:
    """Trace, and return the exit code."""
    if settings.needs_data and data.data is None:
        raise UsageError(f"--data is missing, which --method {settings.method} needs; give a file or a data set.")
    if result.out.exists():
        raise InputError(f"--out {result.out} exists; give another name, or remove it first.")
    set_seed(data.seed)
    model, _, examples = load(base, data)
    batches = None
    if settings.needs_data:
        shuffled, _ = hold_out(examples, 0.0, data)
        batches = batches_of(shuffled, data.batch_size, settings.num_samples)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        model.to(accelerator)  # type: ignore[arg-type]
    masks = trace_and_mask(model, batches, replace(settings, progress=shows_bars()))
    masks.save(result.out)
    print(masks.summary().splitlines()[-1])
    print(f"masks: {result.out}")
    return 0
