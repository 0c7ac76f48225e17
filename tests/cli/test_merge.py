"""`merge` and `export`."""

from pathlib import Path

import pytest
import torch
from command_line import Command, Place
from peft import PeftModel
from tiny_checkpoint import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sylva_compile

IDS = torch.arange(3, 23)[None]

# PEFT makes a sparse tensor and neither asks for checks nor declines them.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def trained(place: Place) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(place.model)
    sylva_compile.load_adapter(model, place.run)
    return model


@pytest.mark.parametrize("command_name", ["merge", "export"])
def test_an_ordinary_checkpoint(command_name: str, tmp_path: Path, command: Command, place: Place) -> None:
    out = tmp_path / "new" / "merged"
    found = command(command_name, "--model", place.model, "--adapter", place.run, "--out", out)
    assert found.code == 0, found.err
    assert found.out == f"checkpoint: {out}\n"
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert type(merged).__module__.startswith("transformers")
    for name, value in trained(place).state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)
    assert AutoTokenizer.from_pretrained(out)("The pub").input_ids
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    again = command(command_name, "--model", place.model, "--adapter", place.run, "--out", out)
    assert again.code == 1 and f"--out {out} exists" in again.err


def test_an_adapter_of_peft(tmp_path: Path, command: Command, place: Place) -> None:
    out = tmp_path / "shira"
    arguments = ["--model", place.model, "--adapter", place.run, "--out", out, "--format", "shira"]
    found = command("export", *arguments)
    assert found.code == 0, found.err
    assert found.out == f"PEFT adapter (SHiRA): {out}\n"
    base = AutoModelForCausalLM.from_pretrained(place.model)
    with torch.no_grad():
        expected = trained(place).eval()(IDS).logits
        plain = base.eval()(IDS).logits
        logits = PeftModel.from_pretrained(base, out).eval()(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)
    assert command("export", *arguments).code == 1


@pytest.mark.parametrize("command_name", ["merge", "export"])
def test_errors_leave_nothing(
    command_name: str, tmp_path: Path, command: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = save_tiny_model(Path("other"), "gpt2")
    Path("file").touch()
    for change, message in (
        ({"--adapter": "nothing"}, "sylva_adapter.json does not exist"),
        ({"--model": "nothing/at/all"}, "is no folder or GGUF file"),
        ({"--model": str(other)}, "which this model lacks"),
        ({"--out": "file"}, "--out file exists"),
        ({"--out": "file/in"}, "--out file/in cannot be made"),
    ):
        options = {"--model": str(place.model), "--adapter": str(place.run), "--out": "out"} | change
        found = command(command_name, *(part for option in options.items() for part in option))
        assert found.code == 1 and message in found.err and found.err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["file", "other"]
