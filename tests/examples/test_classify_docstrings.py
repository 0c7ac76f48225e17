import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    # Later tests must not find these by their plain names.
    for name in ("classify_docstrings", "docstrings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("classify_docstrings")
    for name in ("classify_docstrings", "docstrings"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module


def test_runs_and_leaves_adapter_and_picture(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--small", "--steps", "3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"weight gradients rewritten.*36 of 36", printed)
    assert "bit for bit" in " ".join(printed.split())
    picture = (tmp_path / "out" / "masks.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    config = json.loads((tmp_path / "out" / "adapter" / "sylva_adapter.json").read_text())
    assert len(config["weights"]) == 36
    assert all("bert.encoder" in name for name in config["weights"])
    assert {name.rpartition(".")[0].split(".")[-1] for name in config["modules_to_save"]} == set(demo.HEAD)


def test_no_module_is_trained_and_tested_on(demo: ModuleType) -> None:
    docstrings = demo.collect_docstrings()
    train, test = demo.split_by_module(docstrings, test_share=0.25)
    assert len(train) + len(test) == len(docstrings) > 1500
    assert not {d.module for d in train} & {d.module for d in test}
    assert not {d.text.lower() for d in train} & {d.text.lower() for d in test}
    for package in demo.PACKAGES:
        held_out = sum(d.package == package for d in test)
        assert 0 < held_out < sum(d.package == package for d in train)


def test_package_names_are_taken_out(demo: ModuleType) -> None:
    for docstring in demo.collect_docstrings():
        assert not any(package in docstring.text.lower() for package in demo.PACKAGES)


def test_a_step_is_needed(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0", "--out", str(tmp_path)])


def test_every_sequence_has_one_shape(demo: ModuleType) -> None:
    tokenizer, model = demo.load_base(seed=0)
    data = demo.tokenize(demo.collect_docstrings()[:5], tokenizer)
    assert data["input_ids"][:].shape == data["attention_mask"][:].shape == (5, demo.LENGTH)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}
    assert data["labels"][:].dtype == torch.int64
