"""The structure of the project: links, imports, names, files."""

import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.utils import is_kernels_available

import sylva_compile
from sylva_compile.cli.main import main

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("room", ["kernels", "passes"])
def test_links_in_the_root_shadow_nobody(room: str) -> None:
    assert (ROOT / room).is_symlink()
    assert (ROOT / room).resolve() == ROOT / "sylva_compile" / room
    # A regular package named `kernels` on sys.path would shadow Hugging Face's.
    assert not (ROOT / room / "__init__.py").exists()


def test_transformers_imports_from_the_root() -> None:
    code = "import transformers, sylva_compile.kernels.sddmm.op; transformers.LlamaConfig()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_link_to_our_kernels_is_not_taken_for_those_of_hugging_face() -> None:
    installed = any(found.name == "kernels" for found in distributions())
    assert find_spec("kernels") is not None, "the root is on the path of the tests"
    assert is_kernels_available() == installed


def test_public_names() -> None:
    for name in sylva_compile.__all__:
        assert getattr(sylva_compile, name).__doc__ or name == "__version__"
    assert sylva_compile.__version__ == version("sylva-compile")
    assert (ROOT / "sylva_compile" / "py.typed").exists()


def test_the_backend_is_registered() -> None:
    (entry,) = (found for found in entry_points(group="torch_dynamo_backends") if found.name == "sylva")
    assert callable(entry.load())


def test_the_command_line_is_a_script() -> None:
    assert pkgutil.resolve_name(CONFIG["project"]["scripts"]["sylva-compile"]) is main


def test_imports_point_one_way() -> None:
    """Check the contracts in pyproject.toml, as `make lint` does too."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    found = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_contracts_see_every_file() -> None:
    settings = CONFIG["tool"]["importlinter"]
    # Imports under TYPE_CHECKING can make cycles too.
    assert not settings.get("exclude_type_checking_imports", False)
    seen = grimp.build_graph(*settings["root_packages"], cache_dir=None).modules
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "sylva_compile").rglob("*.py"))
    assert {".".join(path.parts).removesuffix(".__init__") for path in files} <= seen


def test_files_that_are_no_python_are_packaged() -> None:
    package = ROOT / "sylva_compile"
    patterns = CONFIG["tool"]["setuptools"]["package-data"]["sylva_compile"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packaged


@pytest.mark.parametrize("path", sorted((ROOT / "sylva_compile").rglob("*.py")), ids=lambda path: path.stem)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("pattern", [*CONFIG["tool"]["ruff"]["lint"]["per-file-ignores"]])
def test_paths_in_the_settings_of_ruff_exist(pattern: str) -> None:
    assert any(ROOT.glob(pattern))


def test_modules_in_the_settings_of_mypy_exist() -> None:
    for override in CONFIG["tool"]["mypy"]["overrides"]:
        for module in override["module"]:
            assert not module.startswith("sylva_compile") or find_spec(module) is not None


def test_a_public_function_hides_no_module() -> None:
    assert callable(sylva_compile.backend)
    assert find_spec("sylva_compile.backend") is None
    functions = {name for name in sylva_compile.__all__ if isinstance(getattr(sylva_compile, name), FunctionType)}
    assert not functions & {module.name for module in pkgutil.iter_modules(sylva_compile.__path__)}


RUN = """
import sys, time
{before}
started = time.perf_counter()
import {module}
print(time.perf_counter() - started)
"""


def seconds_to_import(module: str, before: str = "") -> float:
    """Return the seconds that an import takes, the least of three processes."""
    runs = (
        subprocess.run(
            [sys.executable, "-c", RUN.format(module=module, before=before)], capture_output=True, text=True, check=True
        )
        for _ in range(3)
    )
    return min(float(run.stdout) for run in runs)


def test_importing_the_package_costs_little_beside_torch() -> None:
    assert seconds_to_import("sylva_compile", before="import torch") < 0.1 * seconds_to_import("torch")


WITHOUT = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
import sylva_compile

model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
batches = [torch.randn(6, 24) for _ in range(3)]
def loss_fn(model, batch): return model(batch).square().mean()
masks = sylva_compile.trace_and_mask(
    model, batches, block_size=8, sparsity=0.5, num_samples=18, loss_fn=loss_fn, progress=False
)
model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = loss_fn(model, batches[0])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
sylva_compile.save_adapter(model, sys.argv[1])
assert {blocked!r} not in sys.modules
print("done")
"""


@pytest.mark.parametrize("blocked", ["triton", "transformers"])
def test_trains_on_the_cpu_without(blocked: str, tmp_path: Path) -> None:
    code = WITHOUT.format(blocked=blocked)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.endswith("done\n"), run.stderr


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in CONFIG["project"]
    assert CONFIG["project"]["dynamic"] == ["version"]
    assert CONFIG["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sylva_compile.version.__version__"}
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == sylva_compile.__version__
    assert f"\n## {sylva_compile.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", CONFIG["project"]["optional-dependencies"])
def test_what_an_extra_installs_has_a_pinned_version(name: str) -> None:
    pinned = {
        canonicalize_name(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    needed = {canonicalize_name(Requirement(text).name) for text in CONFIG["project"]["optional-dependencies"][name]}
    assert needed - {"sylva-compile"} <= pinned
