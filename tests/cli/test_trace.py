from pathlib import Path

from command_line import QUICK, Command, Place
from transformers import AutoModelForCausalLM

import sylva_compile


def test_masks_are_those_of_the_model(tmp_path: Path, command: Command, place: Place) -> None:
    out = tmp_path / "masks.safetensors"
    found = command("trace", "--model", place.model, "--data", place.table, "--column", "text", *QUICK, "--out", out)
    assert found.code == 0, found.err
    masks = sylva_compile.Masks.load(out)
    masks.embed(AutoModelForCausalLM.from_pretrained(place.model))
    assert masks.config["method"] == "sylva" and masks.config["num_samples"] == 8
    assert f"{len(masks)} weights, " in found.out and found.out.endswith(f"masks: {out}\n")
    again = command("trace", "--model", place.model, "--data", place.table, "--column", "text", *QUICK, "--out", out)
    assert again.code == 1 and f"--out {out} exists" in again.err


def test_methods_without_data_need_none(tmp_path: Path, command: Command, place: Place) -> None:
    out = tmp_path / "masks"
    found = command("trace", "--model", place.model, "--method", "magnitude", "--block-size", "8", "--out", out)
    assert found.code == 0, found.err
    assert sylva_compile.Masks.load(out).config["method"] == "magnitude"


def test_errors_leave_nothing(tmp_path: Path, command: Command, place: Place) -> None:
    out = tmp_path / "masks"
    for wrong, message in (
        (["--data", tmp_path / "none.csv"], "is no file"),
        (["--method", "random", "--scope", "nothing_proj"], "nothing_proj"),
        (["--method", "random", "--block-size", "512"], "block"),
    ):
        found = command("trace", "--model", place.model, "--out", out, *wrong)
        assert found.code in (1, 2) and message in found.err and found.err.count("\n") == 1
        assert not out.exists()
