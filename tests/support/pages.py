"""Run the Python of a Markdown page from top to bottom.

A comment right before a block says what it needs:

    <!-- test: new model -->                   given names anew: a frozen tiny Llama and what belongs to it
    <!-- test: with masks -->                  the same, with random blocks embedded
    <!-- test: one process -->                 torch.distributed can be initialised, with one process
    <!-- test: no run -->                      compile the block, and do not run it: it needs a network

Several are separated by semicolons. A run is the blocks from one that starts anew up to the next one that does.
"""

import contextlib
import copy
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import sylva_compile
from sylva_compile import Masks

_BLOCK = re.compile(r"(?:<!-- test: (?P<marks>[^\n]*?) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
_TOKENIZER = tiny_tokenizer()
_MARKS = ("new model", "with masks", "one process", "no run")


@dataclass(frozen=True)
class Block:
    """A block of code; `line` is where it starts in the page."""

    page: Path
    line: int
    code: str
    marks: tuple[str, ...]

    @property
    def starts_anew(self) -> bool:
        return "new model" in self.marks or "with masks" in self.marks


def runs_of(page: Path) -> list[list[Block]]:
    """Return the runs of `page`, none of them empty."""
    text = page.read_text()
    runs: list[list[Block]] = []
    for match in _BLOCK.finditer(text):
        marks = tuple(mark.strip() for mark in (match["marks"] or "").split(";") if mark.strip())
        assert set(marks) <= set(_MARKS), f"{page}: nobody knows one of the marks {marks}"
        block = Block(page, text[: match.start("code")].count("\n") + 1, match["code"], marks)
        if block.starts_anew or not runs:
            runs.append([])
        runs[-1].append(block)
    return runs


def run(blocks: list[Block]) -> dict[str, Any]:
    """Run `blocks` in the current directory, and return the names that they leave.

    Sizes are those of real models in the pages, and are made small. Only README's code is compiled by Inductor.
    """
    names = _given(with_masks="with masks" in blocks[0].marks)
    with _one_process() if "one process" in blocks[0].marks else contextlib.nullcontext():
        for block in blocks:
            code = compile(
                "\n" * (block.line - 1) + small(block.code, generate=block.page.name == "README.md"),
                str(block.page),
                "exec",
            )
            if "no run" not in block.marks:
                exec(code, names)
    return names


def small(code: str, *, generate: bool) -> str:
    """Return `code` with sizes for tiny models; without code generation, which takes long, unless `generate`."""
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, bf16=False')
    code = re.sub(r"block_size=\d+", "block_size=8", code).replace("num_samples=256", "num_samples=12")
    if generate:
        return code
    return re.sub(r"sylva_compile\.backend\(masks(?!, inner)", 'sylva_compile.backend(masks, inner="aot_eager"', code)


def save_tiny_model(folder: Path) -> None:
    """Write a tiny Llama and its tokenizer, as `save_pretrained` does."""
    _tiny_model().save_pretrained(folder)
    _TOKENIZER.save_pretrained(folder)


def _tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": _TOKENIZER.eos_token_id, "pad_token_id": _TOKENIZER.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(_TOKENIZER), **special, **sizes, **heads))


def _given(*, with_masks: bool) -> dict[str, Any]:
    model = _tiny_model().requires_grad_(False)
    model.config.use_cache = False
    ids = torch.randint(3, len(_TOKENIZER), (4, 10))
    batch = {"input_ids": ids, "labels": ids}
    numbers = range(8)
    pairs = {"prompt": [f"after {k} " for k in numbers], "chosen": [f"comes {k + 1}" for k in numbers]}
    names = {
        "copy": copy,
        "torch": torch,
        "sylva_compile": sylva_compile,
        "model": model.train(),
        "base": copy.deepcopy(model),
        "original": copy.deepcopy(model),
        "loader": [batch] * 3,
        "batch": batch,
        "tokenizer": _TOKENIZER,
        "dataset": Dataset.from_dict({key: value.tolist() for key, value in batch.items()}),
        "texts": Dataset.from_dict({"text": [f"{k} and {k + 1}" for k in numbers]}),
        "pairs": Dataset.from_dict({**pairs, "rejected": [f"comes {k}" for k in numbers]}),
    }
    if with_masks:
        names["masks"] = _embedded(model)
    return names


def _embedded(model: torch.nn.Module) -> Masks:
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.8, block_size=8)
    masks.embed(model)
    return masks


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # accelerate warns where a distributed run leaves it open.
    wanted["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
