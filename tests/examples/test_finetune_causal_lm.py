import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoint import make_tokenizer, save_table, save_tiny_model
from transformers import AutoModelForCausalLM

import sylva_compile

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_causal_lm.py"
QUICK = ["--inner", "aot_eager", "--block-size", "16", "--sparsity", "0.5", "--steps", "4", "--batch-size", "4"]
# The tiny models have 64 positions.
QUICK += ["--length", "32"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_causal_lm", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trains_on_a_table_and_writes_an_adapter(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = save_tiny_model(tmp_path / "model", kind)
    data = save_table(tmp_path / "data.csv")
    out = tmp_path / "adapter"
    example.main(["--model", str(model), "--data", str(data), "--column", "text", "--out", str(out), *QUICK])
    fresh = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    base = {name: value.clone() for name, value in fresh.state_dict().items()}
    masks = sylva_compile.load_adapter(fresh, out)
    assert f"{len(masks)} of {len(masks)} weight gradients rewritten" in capsys.readouterr().out
    assert all(not torch.equal(base[name], fresh.state_dict()[name]) for name in masks)


def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    model, data, out = save_tiny_model(tmp_path / "model", "llama"), save_table(tmp_path / "data.csv"), tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    arguments = ["--model", str(model), "--data", str(data), "--column", "text", "--out", str(out), *QUICK]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weight gradients rewritten; adapter") == 1
    fresh = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    base = {name: value.clone() for name, value in fresh.state_dict().items()}
    masks = sylva_compile.load_adapter(fresh, out)
    assert all(not torch.equal(base[name], fresh.state_dict()[name]) for name in masks)


def test_padding_carries_neither_attention_nor_loss(example: ModuleType, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "data.csv"
    path.write_text("text\nThe pub\nThe famous pub near the river\n")
    for row in example.read_examples(path, "text", tokenizer, 32):
        ids, mask, labels = (row[name] for name in ("input_ids", "attention_mask", "labels"))
        assert len(ids) == len(mask) == len(labels) == 32
        assert [label for label in labels if label != -100] == ids[: sum(mask)]
        assert ids[sum(mask) - 1] == tokenizer.eos_token_id
