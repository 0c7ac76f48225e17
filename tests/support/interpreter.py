"""Run a file's Triton cases in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import sylva_compile


def run_in_interpreter(file: str) -> None:
    """Run the tests of `file` in a new process. Raises AssertionError, with its output, unless they pass."""
    root = str(Path(sylva_compile.__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
