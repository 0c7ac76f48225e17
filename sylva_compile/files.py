"""Files that are whole at every moment: written beside their place, then renamed onto it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one, never a part.

    `private` keeps it from everybody else, whatever the umask allows.
    """
    with replacing(path, private=private) as beside:
        beside.write_bytes(content)


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A file to write beside `path`, renamed onto it at the end; after an error it is gone and `path` is as before."""
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
