"""torch's private API: every name that the package uses exists, and the error for a missing one says what to do."""

import ast
from pathlib import Path

import pytest

from sylva_compile import _torch

PACKAGE = Path(_torch.__file__).parent
TREE = ast.parse(Path(_torch.__file__).read_text())


@pytest.mark.parametrize("name", sorted(_torch.PRIVATE))
def test_every_private_name_is_there(name: str) -> None:
    assert getattr(_torch, name) is not None


def test_type_checkers_see_the_names_of_the_table() -> None:
    (block,) = (node for node in TREE.body if isinstance(node, ast.If))
    typed = {
        alias.asname: (line.module, alias.name)
        for line in block.body
        for alias in line.names  # type: ignore[attr-defined]
    }
    assert typed == {name: (one.module, one.name) for name, one in _torch.PRIVATE.items()}


def test_a_name_that_is_gone_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_torch.PRIVATE, "compile_fx", _torch.Private("torch._inductor", "no_such_name", "do this"))
    with pytest.raises(ImportError, match=r"no torch\._inductor\.no_such_name.*2\.13.*do this\."):
        _torch.compile_fx  # noqa: B018


def test_a_name_that_nobody_listed_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'listed_nowhere'"):
        _torch.listed_nowhere  # noqa: B018


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_are_imported_in_one_file(path: Path) -> None:
    if path.name == "_torch.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            private = any(part.startswith("_") for part in parts) or any(
                alias.name.startswith("_") for alias in node.names if parts[0] in ("torch", "functorch")
            )
            assert not (parts[0] in ("torch", "functorch") and private), f"{path}: {ast.unparse(node)}"
