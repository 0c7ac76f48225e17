import json
from pathlib import Path

import pytest
from command_line import Command, Place
from transformers import AutoModelForCausalLM

import sylva_compile


def test_json_holds_what_the_adapter_holds(command: Command, place: Place) -> None:
    found = command("inspect", place.run, "--json")
    assert found.code == 0
    told = json.loads(found.out)
    masks = sylva_compile.load_adapter(AutoModelForCausalLM.from_pretrained(place.model), place.run)
    assert told["kind"] == "adapter" and told["moves"] == 2 and told["schedule"]["every"] == 2
    assert told["settings"]["sparsity"] == 0.9 and told["settings"]["block_size"] == 8
    assert told["base"] == masks.config["base"] and "torch" in told["versions"]
    assert {weight["name"]: weight["now"] for weight in told["weights"]} == {
        name: mask.trainable for name, mask in masks.items()
    }
    trained = told["trained"]
    assert trained["now"] == sum(mask.trainable for mask in masks.values()) < trained["ever"] <= trained["of"]


def test_tables_for_a_terminal(command: Command, place: Place) -> None:
    found = command("inspect", place.run)
    assert found.code == 0
    lines = found.out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert any(line.startswith("moves     2 (every=2") for line in lines)
    assert next(line.split() for line in lines if line.startswith("self_attn.k_proj"))[1] == "2"
    assert [line.split()[0] for line in lines[-2:]] == ["model.layers.0", "model.layers.1"]


def test_masks_and_remainders(tmp_path: Path, command: Command, place: Place) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.model)
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=24, scope=["up_proj"])
    masks.save(tmp_path / "masks")
    told = json.loads(command("inspect", tmp_path / "masks", "--json").out)
    assert told["kind"] == "masks" and told["moves"] == 0
    assert told["trained"]["now"] == told["trained"]["ever"] == sum(mask.trainable for mask in masks.values())
    assert "masks" in command("inspect", tmp_path / "masks").out


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "does not exist"), (".", "holds no sylva_adapter.json"), ("file", "is damaged or no mask file")],
)
def test_what_it_refuses(
    name: str, message: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no masks")
    found = command("inspect", name)
    assert found.code == 1 and message in found.err and found.err.count("\n") == 1 and not found.out
