"""Atomic writes: a file is written under a temporary name and then renamed, so that readers see it whole."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one, never a part.

    With `private`, only the owner can read the file, whatever the umask allows.
    """
    with replacing(path, private=private) as beside:
        beside.write_bytes(content)


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`: renamed to `path` at the end, deleted after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        # A temporary file is private; the finished one gets the permissions that a plain open() would give it.
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o600 if private else 0o666 & ~umask)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_files(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder inside `directory`, whose files are moved there at the end, or deleted after an error.

    Folders in it keep their files. A file is never there in part; one that is there already is replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=directory) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).rglob("*")):
            target = directory / path.relative_to(folder)
            if path.is_dir():
                target.mkdir(exist_ok=True)
                continue
            with path.open("rb") as written:
                os.fsync(written.fileno())
            path.replace(target)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON. Numbers of other libraries become floats, and objects that JSON lacks their text."""
    return json.dumps(value, indent=indent, default=_plain)


def _plain(value: Any) -> float | str:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
