"""The demo's model is put in place whole, also where two processes unpack it at a time."""

from pathlib import Path

import pytest

from examples.smollm2 import put_in_place


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize(
    ("there", "kept"), [(None, "mine"), ({}, "mine"), ({"part": "half"}, "mine"), ({"config": "theirs"}, "theirs")]
)
def test_a_whole_model_of_another_process_stays(tmp_path: Path, there: dict[str, str] | None, kept: str) -> None:
    beside, folder = folder_of(tmp_path / "beside", config="mine"), tmp_path / "model"
    if there is not None:
        folder_of(folder, **there)
    put_in_place(beside, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == kept
