"""IST and RST on LoRA: what trains, and what a change that is scaled down gives."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.quality.lora_layers import EVERY, SUPPRESS, LoraLayers
from benchmarks.quality.methods import METHODS, check_options
from benchmarks.quality.ready import Budgeted, Ready
from benchmarks.quality.tasks.classification import load_model

BUDGET = Budgeted(r".*\bencoder\..*", 0.8, 8)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 500, (8, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 2}


def lora(policy: str) -> tuple[Ready, dict[str, Any]]:
    options = {"kind": "lora", "policy": policy, "fraction": 0.5}
    assert check_options(options) is None
    ready = METHODS["lora"].prepare(load_model("tiny", 0), options, BUDGET, lambda options: None, 0)  # type: ignore[arg-type, return-value]
    with torch.no_grad():
        for parameter in ready.trained:
            parameter.normal_(std=0.1)
    return ready, options


def layer_of(name: str) -> int:
    return int(name.split(".layer.")[1].split(".")[0])


@pytest.mark.parametrize("policy", ["random", "importance"])
def test_the_layers_that_are_drawn_train_and_no_other(policy: str) -> None:
    ready, _ = lora(policy)
    names = {name: p for name, p in ready.model.named_parameters() if ".lora_" in name}
    optimizer = torch.optim.SGD(ready.trained, lr=0.1)
    layers = LoraLayers(ready.model, {"policy": policy, "fraction": 0.5}, 0, [batch()])
    seen = set()
    for _ in range(2 * EVERY + 1):
        drawn, before = set(layers.drawn), {name: p.detach().clone() for name, p in names.items()}
        ready.model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        layers.step()
        assert {layer_of(name) for name, p in names.items() if not torch.equal(p, before[name])} == drawn
        seen |= drawn
    assert len(seen) > len(drawn)


def test_a_change_that_is_scaled_down() -> None:
    torch.manual_seed(0)
    ready, options = lora("importance")
    ready.model.train()
    layers, inputs = LoraLayers(ready.model, options, 0, [batch()]), batch()
    before = ready.model(**inputs).loss.item()
    twin = copy.deepcopy(ready.model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".lora_B" in name and layer_of(name) == 1:
                parameter *= SUPPRESS
    found = layers._loss_without([1], inputs)
    assert found == pytest.approx(twin.eval()(**inputs).loss.item(), abs=1e-6)
    # The model is as it was, in its mode too.
    assert ready.model.training
    assert ready.model(**inputs).loss.item() == before != pytest.approx(found, abs=1e-6)


def test_kinds_without_a_scaled_change_are_refused() -> None:
    for kind in ("dora", "shira"):
        assert "'lora' and 'rslora'" in str(check_options({"kind": kind, "policy": "random", "fraction": 0.5}))
    assert check_options({"kind": "rslora", "policy": "random"}) is not None
    assert check_options({"kind": "full", "policy": "random", "fraction": 0.5}) is not None
