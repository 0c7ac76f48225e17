"""`report`."""

from pathlib import Path

import pytest
from command_line import Command, Place
from transformers import AutoModelForCausalLM

import sylva_compile


def test_a_page_with_the_curves_of_the_run(tmp_path: Path, command: Command, place: Place) -> None:
    page = tmp_path / "new" / "report.html"
    found = command("report", "--model", place.model, "--adapter", place.run, "--out", page)
    assert found.code == 0, found.err
    assert found.out == f"report: {page}\n"
    text = page.read_text()
    assert "moves of the blocks" in text and "Over the steps" in text
    assert "model.layers.1.mlp.up_proj.weight" in text


def test_an_adapter_without_a_log_has_no_curves(tmp_path: Path, command: Command, place: Place) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.model)
    sylva_compile.load_adapter(model, place.run)
    adapter = tmp_path / "deep" / "adapter"
    sylva_compile.save_adapter(model, adapter)
    page = tmp_path / "report.html"
    found = command("report", "--model", place.model, "--adapter", adapter, "--out", page)
    assert found.code == 0, found.err
    assert "Over the steps" not in page.read_text()


@pytest.mark.parametrize(
    ("option", "message"), [("--log", "There is no trainer_state"), ("--adapter", "does not exist")]
)
def test_what_is_missing_is_named_and_nothing_is_written(
    option: str, message: str, tmp_path: Path, command: Command, place: Place
) -> None:
    page = tmp_path / "report.html"
    arguments = ["--model", place.model, "--adapter", place.run, "--out", page]
    found = command("report", *arguments, option, tmp_path / "a" / "b")
    assert found.code == 1 and message in found.err and found.err.count("\n") == 1
    assert not page.exists()


@pytest.mark.parametrize(("place_of", "message"), [("", "is a folder"), ("file/report.html", "cannot be made")])
def test_a_page_that_cannot_be_written_is_found_before_the_model_is_read(
    place_of: str, message: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "file").write_text("")
    found = command("report", "--model", "nobody/nothing", "--adapter", "none", "--out", tmp_path / place_of)
    assert found.code == 1
    assert message in found.err and found.err.count("\n") == 1
