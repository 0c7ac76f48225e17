"""A cache of generated code on disk, from which nothing runs that this user did not put there.

Code that is loaded is code that is trusted, so an entry is used only if

* its directory, and every directory above it, can be changed by this user (or root) alone, and
* the digest in its name is that of its content.

An entry is named `<key>.<digest of the content><suffix>`, is written beside its place and renamed, and is never
changed afterwards. What is cut short, altered or put there by another is rebuilt.
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
    """The file of `key`, built by `build` unless a sound one is there.

    Args:
        key: what the content depends on, all of it; any text.
        suffix: of the file, such as ".py".
        build: gives the content; called only if there is no sound entry.

    Raises:
        OSError: neither the cache nor a temporary directory can be written.
    """
    directory = _private_directory(_wanted_directory())
    name = digest(key.encode())
    for entry in sorted(directory.glob(f"{name}.*{suffix}")):
        if _is_own(entry) and entry.name == f"{name}.{digest(entry.read_bytes())}{suffix}":
            return entry
        log.warning("%s is damaged or not yours; it is built anew.", entry)
        entry.unlink()
    content = build()
    entry = directory / f"{name}.{digest(content)}{suffix}"
    write_file(entry, content, private=True)
    return entry


def digest(content: bytes) -> str:
    """32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]


def _wanted_directory() -> Path:
    """`$SYLVA_COMPILE_CACHE_DIR`, or the platform's place for caches."""
    chosen = os.environ.get("SYLVA_COMPILE_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("sylva_compile"))


@functools.cache
def _private_directory(wanted: Path) -> Path:
    """`wanted`, made if need be; a directory for this process alone if others could write there, or nobody can."""
    try:
        wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
        wanted = wanted.resolve()
        if _is_own(wanted) and all(_is_safe_above(parent) for parent in wanted.parents) and os.access(wanted, os.W_OK):
            return wanted
        why = "others can write there, or you cannot"
    except OSError as error:
        why = str(error)
    log.warning(
        "Generated code is not kept in %s: %s. Set SYLVA_COMPILE_CACHE_DIR to a directory of yours.", wanted, why
    )
    own = Path(tempfile.mkdtemp(prefix="sylva_compile-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _is_own(path: Path) -> bool:
    """Whether `path` belongs to this user and no other can write to it; always, on systems without such owners."""
    if not hasattr(os, "getuid"):
        return True
    found = path.lstat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_safe_above(directory: Path) -> bool:
    """Whether no other user can rename what lies in `directory`: its owner is trusted, or the sticky bit keeps it."""
    if not hasattr(os, "getuid"):
        return True
    found = directory.stat()
    if found.st_uid not in (0, os.getuid()):
        return False
    return not found.st_mode & stat.S_IWOTH or bool(found.st_mode & stat.S_ISVTX)
