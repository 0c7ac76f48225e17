"""Compile C++ with a C interface for the processor of this machine, and load it."""

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.build.code_cache import cached

log = logging.getLogger(__name__)

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 300


@functools.cache
def load(source: str, *, name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the library of `source`, compiled once and kept on disk (see `sylva_compile.kernels.build.code_cache`).

    OpenMP is on and shares torch's threads in a process with torch. `-ffast-math` is off.

    Args:
        source: C++17 whose functions are declared `extern "C"`.
        name: the name of the library in messages.
        flags: further flags for the compiler.

    Raises:
        NativeCompilerError: there is no C++ compiler, it rejects the source, or the library cannot be stored or loaded.
    """
    compiler = _compiler()
    command = (compiler, *_FLAGS, *flags)
    key = "\0".join([*command, _version(compiler), processor(), source])
    try:
        path = cached(key, ".so", functools.partial(_compile, command, source, name))
    except OSError as error:
        raise NativeCompilerError(
            f"{name} cannot be stored: {error}. Set SYLVA_COMPILE_CACHE_DIR to a directory with free space."
        ) from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        # The next process compiles it again.
        path.unlink(missing_ok=True)
        raise NativeCompilerError(
            f"{name} cannot be loaded: {error}. Check CXX, and that {path.parent} allows execution."
        ) from error


def _compiler() -> str:
    """Return the path of `$CXX`, or of the first C++ compiler on PATH; raise NativeCompilerError without one."""
    chosen = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [chosen] if chosen else ["c++", "g++", "clang++"])), None)
    if found is None:
        raise NativeCompilerError(
            f"No C++ compiler {f'{chosen!r} ' if chosen else ''}on the path; install g++ or clang, or set CXX."
        )
    return found


@functools.cache
def _version(compiler: str) -> str:
    """Return what `compiler --version` prints."""
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise NativeCompilerError(f"{compiler} does not run: {error}. Check CXX.") from error


@functools.cache
def processor() -> str:
    """Return the processor's description, on which `-march=native` depends: unlike machines may share one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept) + platform.machine()


def _compile(command: tuple[str, ...], source: str, name: str) -> bytes:
    log.info("compiling %s with %s", name, command[0])
    with tempfile.TemporaryDirectory(prefix="sylva_compile-") as place:
        text, library = Path(place, "source.cpp"), Path(place, "library.so")
        text.write_text(source)
        try:
            done = subprocess.run(
                [*command, str(text), "-o", str(library)], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeCompilerError(f"{command[0]} could not compile {name}: {error}. Check CXX.") from error
        if done.returncode != 0:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise NativeCompilerError(f"{command[0]} refuses {name}: {reason} (with {' '.join(command[1:])}).")
        return library.read_bytes()
