"""The models of tasks in files: where their folders are, and their tokenizers."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.tasks import small_gpt2
from benchmarks.quality.tasks.base import TaskError, without_dropout
from benchmarks.quality.tasks.small_gpt2 import RECIPES, pretrained
from examples.smollm2 import NotInstalledError, smollm2

SMOLLM2 = "smollm2"


def load_decoder(name: str, data: Path) -> PreTrainedModel:
    """Load a causal language model in float32, with dropout off.

    Args:
        name: a model that is pre-trained here, "smollm2", a folder, or a name on the hub.
        data: the folder of the data sets.
    """
    path = _folder(name, data)
    config = without_dropout(AutoConfig.from_pretrained(path))
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)


def load_tokenizer(name: str, data: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it pads with the end of text if it has no padding."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_folder(name, data))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def provenance(name: str, data: Path) -> dict[str, Any]:
    """Return a digest of the weights of a model that was made here."""
    if name not in RECIPES and name != SMOLLM2:
        return {}
    return {"base": _digest(Path(_folder(name, data)) / "model.safetensors")}


@functools.cache
def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


@functools.cache
def _folder(name: str, data: Path) -> str:
    if name in RECIPES:
        return str(pretrained(name, data))
    if name != SMOLLM2:
        return name
    try:
        return str(smollm2(small_gpt2.CACHE / SMOLLM2))
    except NotInstalledError as error:
        raise TaskError(str(error)) from error
