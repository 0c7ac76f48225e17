"""Custom ops import torch alone; their kernels are imported by the first call, and the CPU needs no Triton."""

import subprocess
import sys
from pathlib import Path

import pytest

import sylva_compile
from sylva_compile.kernels.lazy import on_first_call

ROOT = Path(sylva_compile.__file__).parent
OPS = sorted(
    ".".join(("sylva_compile", *path.relative_to(ROOT).with_suffix("").parts))
    for path in (ROOT / "kernels").rglob("*.py")
    if "torch.library.custom_op" in path.read_text()
)

IMPORT_AN_OP = """
import importlib, sys, types

# `sylva_compile/__init__.py` imports the whole library; a package without it shows what the op's module imports.
package = types.ModuleType("sylva_compile")
package.__path__ = [sys.argv[1]]
sys.modules["sylva_compile"] = package
sys.modules["triton"] = sys.modules["sympy"] = None
importlib.import_module(sys.argv[2])
print(*(name for name, module in sys.modules.items() if getattr(module, "__file__", None)))
"""

RUN_WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
import torch
import sylva_compile
from sylva_compile.kernels.sddmm.op import sddmm, sddmm_reference
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared

assert "sylva_compile.kernels.sddmm.cpu" not in sys.modules
lhs, rhs, positions = torch.randn(9, 20), torch.randn(9, 16), torch.tensor([[0, 2], [0, 1]])
expected = sddmm_reference(lhs, rhs, positions, 8)
torch.testing.assert_close(sddmm(lhs, rhs, positions, 8), expected)
torch.testing.assert_close(sddmm_shared([lhs, lhs], rhs, [positions] * 2, 8), [expected] * 2)
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
sylva_compile.AdamW([parameter]).step()
assert bool((parameter < 1).all())
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_is_found() -> None:
    names = {name.removeprefix("sylva_compile.kernels.") for name in OPS}
    of_blocks = {"block_norms", "gather_blocks", "observe", "probe", "sddmm.op", "sddmm.shared_op"}
    of_pruned, of_experts = {"nm_mm", "nm_sample", "nm_transpose"}, {"sddmm.grouped_op"}
    assert names == of_blocks | of_pruned | of_experts


@pytest.mark.parametrize("name", OPS)
def test_an_op_imports_torch_alone(name: str) -> None:
    loaded = run(IMPORT_AN_OP, str(ROOT), name).split()
    assert "torch" in loaded and name in loaded
    assert not [module for module in loaded if module.partition(".")[0] in ("triton", "sympy")]
    torch_only = {f"sylva_compile.kernels.{module}" for module in ("blocks", "gate", "lazy", "nm_codes")} | {
        "sylva_compile.errors"
    }
    assert {module for module in loaded if module.startswith("sylva_compile")} <= {*OPS, *torch_only}


def test_the_cpu_needs_no_triton() -> None:
    run(RUN_WITHOUT_TRITON)


def test_the_module_is_imported_by_the_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sylva_lazy_example.py").write_text("def add(a, *, b):\n    return a + b\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = on_first_call("sylva_lazy_example", "add")
    assert "sylva_lazy_example" not in sys.modules
    try:
        assert function(1, b=2) == 3
        assert "sylva_lazy_example" in sys.modules
    finally:
        sys.modules.pop("sylva_lazy_example", None)
    # The function is looked up once: a later call does not import the module again.
    assert function(3, b=4) == 7
    assert "sylva_lazy_example" not in sys.modules


def test_a_module_that_does_not_exist_fails_at_the_call() -> None:
    function = on_first_call("sylva_compile.kernels.missing", "kernel")
    with pytest.raises(ModuleNotFoundError, match="missing"):
        function()
