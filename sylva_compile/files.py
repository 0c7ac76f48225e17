"""Files that are whole at every moment: written beside their place, then renamed onto it."""

import os
import tempfile
from pathlib import Path


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write `content` to `path`; a crash leaves the old file or the new one, never a part.

    `private` keeps it from everybody else, whatever the umask allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            # A temporary file is private; the finished one gets the permissions that a plain open() would give it.
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
