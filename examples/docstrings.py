"""Docstrings of Python's own standard library, labelled with the package that they come from.

Every machine with Python has this text. A model cannot tell the package by a single word: the names of the packages are
removed, and no module has docstrings in both the training and the test set.
"""

import ast
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# The packages of the standard library with the most documented modules. The list omits packages that a distribution
# may leave out (tkinter, idlelib, lib2to3) or that Python 3.12 dropped (distutils): the task must be equal everywhere.
PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
MIN_WORDS = 4

_NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)


@dataclass(frozen=True)
class Docstring:
    """One docstring: its text without package names, the package, and the module as a path inside the library."""

    text: str
    package: str
    module: str


def collect_docstrings(library: Path | None = None) -> list[Docstring]:
    """Return every docstring of `PACKAGES` with at least `MIN_WORDS` words, in the order of the files.

    A text that occurs in several modules is left out: it has no single label, or could be in both training and test.

    Args:
        library: folder of the standard library; None means that of the running Python.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found: dict[Docstring, None] = {}
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            module = path.relative_to(library).as_posix()
            for text in _docstrings_of(path):
                found[Docstring(text, package, module)] = None
    homes = Counter(docstring.text.lower() for docstring in found)
    return [docstring for docstring in found if homes[docstring.text.lower()] == 1]


def split_by_module(docstrings: Sequence[Docstring], test_share: float) -> tuple[list[Docstring], list[Docstring]]:
    """Split docstrings into training and test, with every module on one side only.

    In each package, the largest module stays in training. Each other module, from large to small, goes to the test side
    if it brings that side nearer to `test_share` of the package's docstrings.
    """
    modules: dict[str, Counter[str]] = defaultdict(Counter)
    for docstring in docstrings:
        modules[docstring.package][docstring.module] += 1
    held_out: set[str] = set()
    for sizes in modules.values():
        wanted = test_share * sizes.total()
        for module, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[1:]:
            if abs(wanted - size) < abs(wanted):
                wanted -= size
                held_out.add(module)
    train = [docstring for docstring in docstrings if docstring.module not in held_out]
    test = [docstring for docstring in docstrings if docstring.module in held_out]
    return train, test


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join(_NAMES.sub("", ast.get_docstring(node) or "").split())
            if len(text.split()) >= MIN_WORDS:
                yield text
