import ctypes
from pathlib import Path

import pytest

from sylva_compile.errors import NativeCompilerError
from sylva_compile.kernels.build import native

ANSWER = 'extern "C" int answer() { return 42; }'
THREADS = """
#include <omp.h>
extern "C" int threads(int wanted) {
  int count = 0;
  #pragma omp parallel num_threads(wanted)
  #pragma omp single
  count = omp_get_num_threads();
  return count;
}
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "cache"
    monkeypatch.setenv("SYLVA_COMPILE_CACHE_DIR", str(own))
    native.load.cache_clear()
    return own


def test_a_function_is_called() -> None:
    assert native.load(ANSWER, name="answer").answer() == 42


def test_openmp_has_the_threads_that_are_asked_for() -> None:
    assert native.load(THREADS, name="threads").threads(ctypes.c_int(2)) == 2


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    native.load(ANSWER, name="answer")
    native.load.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *args: pytest.fail("compiled again"))
    assert native.load(ANSWER, name="answer").answer() == 42
    assert len(list(directory.iterdir())) == 1


def test_other_flags_are_another_library(directory: Path) -> None:
    source = 'extern "C" int answer() { return ANSWER; }'
    assert native.load(source, name="answer", flags=("-DANSWER=1",)).answer() == 1
    assert native.load(source, name="answer", flags=("-DANSWER=2",)).answer() == 2


def test_a_damaged_library_is_compiled_again(directory: Path) -> None:
    native.load(ANSWER, name="answer")
    (entry,) = directory.iterdir()
    # Replaced, not overwritten: the library is mapped into this process.
    entry.unlink()
    entry.write_bytes(b"not a library")
    native.load.cache_clear()
    assert native.load(ANSWER, name="answer").answer() == 42


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeCompilerError, match=r"no-such-compiler.*install g\+\+"):
        native.load(ANSWER, name="answer")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("\x7fELF nonsense", "does not run: .* Check CXX"),
        ('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = "-o" ] && echo text > "$2"; shift; done\n', "cannot be loaded"),
    ],
)
def test_a_compiler_that_half_works(
    script: str, message: str, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeCompilerError, match=message) as caught:
        native.load(ANSWER, name="answer")
    assert "\n" not in str(caught.value)
    # A library that cannot be loaded is built anew the next time.
    assert not list(directory.glob("*.so"))


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "cached", full)
    with pytest.raises(NativeCompilerError, match=r"No space left.*SYLVA_COMPILE_CACHE_DIR"):
        native.load(ANSWER, name="answer")


def test_an_error_of_the_compiler_is_shown_in_one_line(directory: Path) -> None:
    with pytest.raises(NativeCompilerError, match=r"refuses broken: .*error") as caught:
        native.load("this is no C++", name="broken")
    assert "\n" not in str(caught.value)
    assert not list(directory.glob("*.so"))
