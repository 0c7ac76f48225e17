"""Causal language models with their tokenizers: read from a folder, the hub or a GGUF file, and written to a folder."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sylva_compile.cli.hub import may_be_on_the_hub
from sylva_compile.cli.logs import shows_bars
from sylva_compile.errors import InputError


def load_model(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer and the model that `name` names, on the CPU, with all weights frozen.

    Args:
        name: a folder written by save_pretrained, a GGUF file, or a name on the hub.
        dtype: of the weights that are not quantised; None for that of the checkpoint.

    Raises:
        InputError: there is no causal language model with a tokenizer.
    """
    quiet()
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        return _load_gguf(path, dtype)
    if path.exists():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name} holds no config.json; give a folder written by save_pretrained.")
        source: dict[str, Any] = {"pretrained_model_name_or_path": path, "local_files_only": True}
    elif may_be_on_the_hub(name):
        source = {"pretrained_model_name_or_path": name}
    else:
        raise InputError(f"--model {name} is no folder or GGUF file, nor a name on the hub; check the path.")
    tokenizer, model = _read(name, source, dtype)
    return tokenizer, model.requires_grad_(False)


def quiet() -> None:
    """Keep transformers from logging hints, and from drawing bars off a terminal."""
    transformers_logging.set_verbosity_error()
    if not shows_bars():
        transformers_logging.disable_progress_bar()


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a checkpoint that from_pretrained loads: beside `folder` first, and then renamed onto it.

    Raises:
        InputError: `folder` cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error}); give a folder of yours.") from error
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        # A temporary folder is private; the finished one is not.
        beside.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def check_new(folder: Path) -> None:
    """Raise InputError if `folder` is a file or holds something, or if it cannot be made; make nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        raise InputError(f"--out {folder} exists; give another name, or remove it first.")
    check_can_be_made(folder)


def check_can_be_made(folder: Path) -> None:
    """Raise InputError if the file or folder cannot be made; make nothing."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"--out {folder} cannot be made: {parent} is a file; give a folder of yours.")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {folder} cannot be made: {parent} may not be written to; give a folder of yours.")


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if not path.is_file():
        raise InputError(f"--model {path} is no file; check the path.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("A GGUF file needs the package gguf; run `pip install gguf`.")
    source = {
        "pretrained_model_name_or_path": path.parent,
        "gguf_file": path.name,
        "local_files_only": True,
    }
    tokenizer, read = _read(str(path), source, dtype)
    # The weights are no longer quantised, and a configuration that says so could be neither trained nor loaded again.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)._from_config(config, dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.config._name_or_path = str(path)
    return tokenizer, model.eval().requires_grad_(False)


def _read(
    name: str, source: dict[str, Any], dtype: torch.dtype | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        return tokenizer, AutoModelForCausalLM.from_pretrained(**source, dtype=dtype or "auto")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Configurations and checkpoints of any kind raise any error.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"--model {name} holds no causal language model with a tokenizer: {reason}") from error
