"""What is imported, and when."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import sys
import sylva_compile
from sylva_compile.integrations import BlocksState, register_blocks_for_checkpointing

assert not {"transformers", "trl", "accelerate"} & set(sys.modules), sorted(sys.modules)
from sylva_compile.integrations import BlocksCallback, BlocksTrainerMixin

assert "transformers" in sys.modules
assert "trl" not in sys.modules
print("done")
"""


def test_frameworks_are_imported_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
