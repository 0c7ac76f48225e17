import os
from pathlib import Path
from typing import Any

import pytest

from sylva_compile.kernels.build import code_cache
from sylva_compile.kernels.build.code_cache import cached


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "cache"
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(own))
    return own


def forbidden() -> bytes:
    raise AssertionError("a sound entry was built again")


def test_an_entry_is_built_once(directory: Path) -> None:
    first = cached("key", ".py", lambda: b"content")
    assert first.read_bytes() == b"content"
    assert first.parent == directory
    assert cached("key", ".py", forbidden) == first


def test_keys_and_suffixes_do_not_meet(directory: Path) -> None:
    first = cached("a", ".py", lambda: b"1")
    assert cached("b", ".py", lambda: b"2").read_bytes() == b"2"
    assert cached("a", ".so", lambda: b"3").read_bytes() == b"3"
    assert first.read_bytes() == b"1"


@pytest.mark.parametrize("damage", [b"", b"con", b"content of another"])
def test_a_damaged_entry_is_built_again(directory: Path, damage: bytes) -> None:
    entry = cached("key", ".py", lambda: b"content")
    entry.write_bytes(damage)
    assert cached("key", ".py", lambda: b"content").read_bytes() == b"content"


@pytest.mark.parametrize("moment", ["digest", "_is_own"])
def test_a_damaged_entry_that_another_process_removes_too(
    directory: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    entry = cached("key", ".py", lambda: b"content")
    entry.write_bytes(b"con")
    before = getattr(code_cache, moment)

    def removing(value: Any) -> Any:
        if value in (entry, b"con"):
            entry.unlink()
        return before(value)

    monkeypatch.setattr(code_cache, moment, removing)
    assert cached("key", ".py", lambda: b"content").read_bytes() == b"content"


def test_a_file_of_another_key_is_not_taken_under_this_name(directory: Path) -> None:
    other = cached("other", ".py", lambda: b"other")
    entry = cached("key", ".py", lambda: b"content")
    other.replace(entry)
    assert cached("key", ".py", lambda: b"content").read_bytes() == b"content"


def test_an_entry_that_others_can_write_is_built_again(directory: Path) -> None:
    entry = cached("key", ".py", lambda: b"content")
    entry.chmod(0o666)
    built = []
    cached("key", ".py", lambda: built.append(1) or b"content")
    assert built


def test_a_generous_umask_does_not_open_the_cache(directory: Path) -> None:
    before = os.umask(0o002)
    try:
        cached("key", ".py", lambda: b"content")
        cached("key", ".py", forbidden)
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_write_is_not_used(
    directory: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    directory.mkdir()
    directory.chmod(mode)
    entry = cached("key", ".py", lambda: b"content")
    assert directory not in entry.parents
    assert "SYLVA_COMPILE_CACHE_DIR" in caplog.text
    assert entry.parent.stat().st_mode & 0o077 == 0


def test_a_directory_that_others_can_replace_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    above = tmp_path / "open"
    above.mkdir()
    above.chmod(0o777)
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(above / "cache"))
    assert above not in cached("key", ".py", lambda: b"content").parents


def test_a_place_that_cannot_be_made_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cached("key", ".py", lambda: b"content").read_bytes() == b"content"


def test_a_link_is_checked_where_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    real.chmod(0o777)
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(tmp_path / "link"))
    assert real not in cached("key", ".py", lambda: b"content").parents


def test_a_crash_while_writing_leaves_no_entry(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cached("key", ".py", lambda: b"content")
    assert not list(directory.iterdir())


def test_by_default_it_lies_where_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYLVA_COMPILE_CACHE_DIR", raising=False)
    assert code_cache._wanted_directory().name == "sylva_compile"
