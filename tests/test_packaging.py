"""The shape of the project: links, imports, names."""

import subprocess
import sys
from importlib.metadata import distributions, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import networkx
import pytest
from transformers.utils import is_kernels_available

import sylva_compile

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", ["kernels", "passes"])
def test_links_in_the_root_shadow_nobody(room: str) -> None:
    assert (ROOT / room).is_symlink()
    assert (ROOT / room).resolve() == ROOT / "sylva_compile" / room
    # A regular package named `kernels` on sys.path would stand in for Hugging Face's.
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


def imports() -> networkx.DiGraph:
    """Which module of the package names which in its import lines."""
    graph = networkx.DiGraph()
    for path in (ROOT / "sylva_compile").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for line in path.read_text().splitlines():
            if line.startswith("from sylva_compile"):
                _, source, _, names = line.split(maxsplit=3)
                found = [f"{source}.{name.strip()}" for name in names.strip("()").split(",") if name.strip()]
                inside = [name for name in found if (ROOT / Path(*name.split("."))).with_suffix(".py").exists()]
                graph.add_edges_from((module, name) for name in inside or [source])
    return graph


def test_imports_point_one_way() -> None:
    graph = imports()
    assert networkx.is_directed_acyclic_graph(graph), networkx.find_cycle(graph)
    # Compiling and caching code know nothing of models either.
    kernels = {"kernels", "native", "code_cache", "errors"}
    for room, may_use in (("kernels", kernels), ("passes", {"passes", "kernels"})):
        for module in graph:
            if module.startswith(f"sylva_compile.{room}."):
                used = {name.split(".")[1] for name in graph.successors(module)}
                assert used <= may_use, f"{module} imports from {used - may_use}"
