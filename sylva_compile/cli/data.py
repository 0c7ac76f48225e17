"""The model and the sequences of a command."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sylva_compile.cli.models import load_model
from sylva_compile.cli.options import DataConfig, ModelConfig
from sylva_compile.cli.sequences import Example, encode
from sylva_compile.cli.tables import read_rows


def load(base: ModelConfig, data: DataConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Example]]:
    """Return the model, its tokenizer and the sequences of `data`, none where no data are given.

    Raises:
        InputError: one of them cannot be read.
    """
    # Data are read first: they are small, and most mistakes are in their options.
    rows = None if data.data is None else read_rows(data.data, data.split, data.subset)
    tokenizer, model = load_model(base.model, torch.bfloat16 if base.bf16 else torch.float32)
    return model, tokenizer, [] if rows is None else encode(rows, tokenizer, data)
