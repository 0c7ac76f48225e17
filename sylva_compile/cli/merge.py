"""`sylva-compile merge`: a base with an adapter in it, as an ordinary checkpoint."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sylva_compile.adapters.format import read_adapter
from sylva_compile.adapters.loading import load_adapter, merge_and_unload
from sylva_compile.cli.models import check_new, load_model, write_model
from sylva_compile.cli.options import AdapterConfig


def run(options: AdapterConfig) -> int:
    """Merge, and return the exit code."""
    check_new(options.out)
    tokenizer, model = load_with_adapter(options.model, options.adapter)
    merge_and_unload(model)
    write_model(model, tokenizer, options.out)
    print(f"checkpoint: {options.out}")
    return 0


def load_with_adapter(name: str, adapter: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer and the base with its adapter, in the dtype that the adapter was trained in.

    Raises:
        InputError: there is no such model.
        AdapterError: there is no adapter, or it is of another base.
    """
    config, _ = read_adapter(adapter)
    dtype: torch.dtype = getattr(torch, next(iter(config["weights"].values()))["dtype"])
    tokenizer, model = load_model(name, dtype)
    load_adapter(model, adapter)
    return tokenizer, model
