from pathlib import Path

import pytest

from sylva_compile.files import replacing_files


def test_files_and_folders_replace_those_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "kept").write_text("kept")
    with replacing_files(tmp_path) as beside:
        (beside / "old").write_text("new")
        (beside / "inner").mkdir()
        (beside / "inner" / "file").write_text("file")
        assert (tmp_path / "old").read_text() == "old"
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"old": "new", "inner/file": "file", "inner/kept": "kept"}


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing_files(tmp_path / "made") as beside:
            (beside / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list((tmp_path / "made").iterdir())
