"""README.md is correct: its Python runs, and the files, modules and make targets that it names exist."""

import copy
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def text_of_tests() -> str:
    """Return the text of all test files, one after another."""
    return "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


def test_the_python_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = tiny("llama")
    names = {
        "torch": torch,
        "model": case.model,
        "base": copy.deepcopy(case.model),
        "loader": [case.batch] * 3,
        "batch": case.batch,
        "dataset": Dataset.from_dict({key: value.tolist() for key, value in case.batch.items()}),
    }
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 12
    for block in blocks:
        # The sizes in README are for real models.
        small = block.replace("block_size=64", "block_size=8").replace("num_samples=256", "num_samples=12")
        # The parts on tracing need a new model.
        own = "checkpoint=" in block or "SylvaConfig(" in block
        exec(small, names | {"model": tiny("llama").model} if own else names)
        if "backend.report()" in block:
            assert names["backend"].report().rewritten == 14
    # Another part compiles each layer; these compiled layers run once the whole model is no longer compiled.
    case.model._compiled_call_impl = None
    case.model(**case.batch).loss.backward()
    assert names["backend"].report().rewritten == 14


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|benchmarks)/(?:\w+/)*\w+\.py", TEXT))))
def test_named_scripts_exist_and_are_tested(path: str) -> None:
    assert (ROOT / path).exists()
    stem = Path(path).stem
    assert re.search(rf"import.*\b{stem}\b|{stem}\.py", text_of_tests())


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks(?:\.\w+)+)", TEXT))))
def test_named_modules_exist_and_are_tested(module: str) -> None:
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()
    package, _, name = module.rpartition(".")
    assert re.search(rf"from {re.escape(package)} import .*\b{name}\b", text_of_tests())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.MULTILINE))))
def test_named_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_environment_variables_are_read_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "sylva_compile").rglob("*.py"))
    for name in set(re.findall(r"SYLVA_[A-Z_]+", TEXT)):
        assert name in source
