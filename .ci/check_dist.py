"""Build the wheel and the sdist into `dist`, and check that the wheel works on its own: `make dist`.

The wheel is installed into a new virtual environment, which sees Python's standard library, the wheel, and the packages
that the wheel names as dependencies, with theirs; these are linked from the environment that runs this script, so that
nothing is downloaded. There, in another folder, a model is trained, saved and loaded, the command line starts, and mypy
checks a client.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PACKAGE = ROOT / "sylva_compile"

USE = """
import sys
from pathlib import Path

import torch
import sylva_compile

assert Path(sylva_compile.__file__).is_relative_to(sys.prefix), sylva_compile.__file__
from importlib.metadata import entry_points, version
assert version("sylva-compile") == sylva_compile.__version__
assert any(entry.name == "sylva" for entry in entry_points(group="torch_dynamo_backends"))


def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    return model.requires_grad_(False)


model, batch = made(), torch.randn(6, 24)
masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=8)
compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
before = compiled(batch).square().mean()
before.backward()
optimizer.step()
after = model(batch).square().mean()
assert after < before, (after, before)
sylva_compile.save_adapter(model, "adapter")
fresh = made()
sylva_compile.load_adapter(fresh, "adapter")
assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
print(f"sylva_compile {sylva_compile.__version__} of the wheel trains, saves and loads")
"""

CLIENT = """
import torch
import sylva_compile

masks: sylva_compile.Masks = sylva_compile.trace_and_mask(torch.nn.Linear(8, 8), method="random", block_size=8)
optimizer: torch.optim.Optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
sylva_compile.backend(masks, inner="nvcc")  # type: ignore[arg-type]
"""
"""mypy must see the wrong argument: without types it would call the comment unused."""


def run(*command: str | Path, **options: object) -> None:
    """Run a command, or end with its exit code."""
    subprocess.run(list(map(str, command)), check=True, **options)  # type: ignore[call-overload]


def build() -> tuple[Path, Path]:
    """Build both files anew and return the wheel and the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    # Old files there would get into the wheel.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, cwd=ROOT, stdout=subprocess.DEVNULL)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check that both hold every file of the package, and the wheel nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not re.match(r"[^/]+\.dist-info/", name)}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    assert packed == wanted, f"only in the wheel or only in the tree: {sorted(packed ^ wanted)}"
    assert {"sylva_compile/py.typed", "sylva_compile/kernels/gate.py", "sylva_compile/passes/runner.py"} <= packed
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    missing = {*wanted, "LICENSE", "README.md", "pyproject.toml"} - sources
    assert not missing, f"not in the sdist: {sorted(missing)}"


def dependencies(requirements: list[str]) -> dict[str, Distribution]:
    """Return the installed distributions that `requirements` need, with all that those need."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        if name in found or (requirement.marker and not any(map(requirement.marker.evaluate, extras))):
            continue
        try:
            found[name] = distribution(requirement.name)
        except PackageNotFoundError:
            # A package that its user does not need here, such as CUDA's beside torch for the CPU.
            continue
        waiting += map(Requirement, found[name].requires or [])
    return found


def install(wheel: Path, folder: Path) -> Path:
    """Make a virtual environment with the wheel and its dependencies; return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    target = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (installed,) = (found for found in Distribution.discover(path=[str(target)]) if found.name == "sylva-compile")
    for found in dependencies(installed.requires or []).values():
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (target / top).exists():
                (target / top).symlink_to(source)
    return python


def main() -> None:
    """Build, check, install, use."""
    wheel, sdist = build()
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        python = install(wheel, Path(folder) / "venv")
        elsewhere = Path(folder) / "client"
        elsewhere.mkdir()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        run(python, "-c", USE, cwd=elsewhere, env=clean)
        run(python.parent / "sylva-compile", "--help", cwd=elsewhere, env=clean, stdout=subprocess.DEVNULL)
        (elsewhere / "client.py").write_text(CLIENT)
        mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--config-file="]
        run(*mypy, "--cache-dir", ROOT / ".mypy_cache" / "dist", "client.py", cwd=elsewhere, env=clean)
    print(f"{wheel.name} and {sdist.name} are in {DIST}")


if __name__ == "__main__":
    main()
