"""Every benchmark starts as a module, and its help shows the command."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
ROOT = FOLDER.parent
STARTED = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def test_some_are_found() -> None:
    assert {"benchmarks.step", "benchmarks.quality.run"} < set(STARTED)


@pytest.mark.parametrize("name", STARTED)
def test_help_says_how_it_is_started(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m {name} ")
    # The docstring, which follows the usage line, shows the command too.
    assert said.count(f"python -m {name} ") > 1


def test_a_module_is_started_from_the_root() -> None:
    command = [sys.executable, "-m", "benchmarks.readme_tables", "--help"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.startswith("usage: python -m benchmarks.readme_tables ")


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_module_changes_where_others_are_found(path: Path) -> None:
    assert "sys.path" not in path.read_text()
