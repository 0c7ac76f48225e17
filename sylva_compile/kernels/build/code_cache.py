"""A cache of generated code on disk that never runs a file which another user put there.

The writer of an entry decides which code this process runs, so an entry is used only if

* this user (or root) alone can change its directory and every directory above it, and
* the digest in its name is the digest of its content.

An entry is named `<digest of the key>.<digest of the content><suffix>`. It is written to a temporary file, renamed, and
never changed afterwards. An entry that is cut short, altered or another user's is rebuilt.
"""

import atexit
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from sylva_compile.files import write_file

log = logging.getLogger(__name__)


def cached(key: str, suffix: str, build: Callable[[], bytes]) -> Path:
    """Return the cached file of `key`; call `build` to make it where there is no valid one.

    Args:
        key: any text that names everything the content depends on.
        suffix: the file name's suffix, such as ".py".
        build: returns the content.

    Raises:
        OSError: this user can write neither to the cache nor to a temporary directory.
    """
    directory = _private_directory(_wanted_directory())
    name = digest(key.encode())
    for entry in sorted(directory.glob(f"{name}.*{suffix}")):
        try:
            if _is_own(entry) and entry.name == f"{name}.{digest(entry.read_bytes())}{suffix}":
                return entry
        except FileNotFoundError:
            continue  # Another process has found it damaged, and removed it.
        log.warning("%s is damaged or belongs to another user; it is built anew.", entry)
        entry.unlink(missing_ok=True)
    content = build()
    entry = directory / f"{name}.{digest(content)}{suffix}"
    write_file(entry, content, private=True)
    return entry


def digest(content: bytes) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()[:32]


def _wanted_directory() -> Path:
    """Return `$SYLVA_COMPILE_CACHE_DIR`, or the platform's directory for caches."""
    chosen = os.environ.get("SYLVA_COMPILE_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("sylva_compile"))


@functools.cache
def _private_directory(wanted: Path) -> Path:
    """Return `wanted`, created if need be; a temporary directory if other users can write there or this user cannot."""
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = wanted.resolve()
        if _is_own(wanted) and all(_is_safe_above(parent) for parent in wanted.parents) and os.access(wanted, os.W_OK):
            return wanted
        why = "other users can write there, or you cannot"
    except OSError as error:
        why = str(error)
    log.warning(
        "Generated code is not kept in %s: %s. Set SYLVA_COMPILE_CACHE_DIR to a directory of your own.", wanted, why
    )
    own = Path(tempfile.mkdtemp(prefix="sylva_compile-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _is_own(path: Path) -> bool:
    """Return whether `path` is this user's and no other user can write to it; true on systems without file owners."""
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_safe_above(directory: Path) -> bool:
    """Return whether other users cannot rename entries of `directory`: its owner is trusted, or its sticky bit set."""
    if not hasattr(os, "getuid"):
        return True
    found = directory.stat()
    if found.st_uid not in (0, os.getuid()):
        return False
    return not found.st_mode & stat.S_IWOTH or bool(found.st_mode & stat.S_ISVTX)
