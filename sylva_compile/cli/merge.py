"""`sylva-compile merge`: a base with an adapter in it, as an ordinary checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sylva_compile.adapters.format import read_adapter
from sylva_compile.adapters.loading import load_adapter, merge_and_unload
from sylva_compile.blocks.embed import block_states
from sylva_compile.cli.models import check_new, load_model, write_model
from sylva_compile.cli.options import AdapterConfig
from sylva_compile.cli.run_folder import dtype_of_run
from sylva_compile.errors import InputError


def run(options: AdapterConfig) -> int:
    """Merge, and return the exit code.

    Raises:
        InputError: there is something at `out`, or the base is quantised and is to stay so.
    """
    check_new(options.out)
    tokenizer, model = load_with_adapter(options.model, options.adapter)
    if not options.dequantise and any(state.is_quantised for state in block_states(model).values()):
        raise InputError(
            f"--model {options.model} is quantised, and its weights cannot take the trained values; give --dequantise "
            "for a checkpoint with dense ones."
        )
    merge_and_unload(model, dequantise=options.dequantise)
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
    tokenizer, model = load_model(name, _dtype(config, adapter))
    load_adapter(model, adapter)
    return tokenizer, model


def _dtype(config: Mapping[str, Any], adapter: Path) -> torch.dtype | None:
    """Return the dtype of the frozen weights in training; None if an adapter of a quantised base does not tell."""
    dtype = getattr(torch, next(iter(config["weights"].values()))["dtype"], None)
    return dtype if isinstance(dtype, torch.dtype) else dtype_of_run(adapter)
