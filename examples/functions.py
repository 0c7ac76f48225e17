"""Functions of Python's own standard library, each with the first sentence of its docstring.

Every machine with Python has this text. No module has functions in both the training and the held-out set.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Packages that a distribution may leave out, that Python 3.12 and 3.13 dropped, and data.
LEFT_OUT = {
    *("distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter"),
    *(
        "aifc",
        "asynchat",
        "asyncore",
        "cgi",
        "cgitb",
        "chunk",
        "crypt",
        "imghdr",
        "imp",
        "mailcap",
        "msilib",
        "nntplib",
    ),
    *("pipes", "smtpd", "sndhdr", "sunau", "telnetlib", "turtle", "turtledemo", "uu", "xdrlib"),
}
WORDS = range(4, 31)
"""Numbers of words of a sentence that is taken."""
MAX_SIGNATURE = 90
"""Characters of the longest signature that is taken."""


@dataclass(frozen=True)
class Function:
    """A documented function or method: its module, its signature, and the first paragraph of its docstring."""

    module: str
    signature: str
    docstring: str


def collect_functions(library: Path | None = None) -> list[Function]:
    """Return the public, documented functions of the standard library in the order of its files, no docstring twice.

    Args:
        library: folder of the standard library; None means that of the running Python.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Function] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not LEFT_OUT.intersection(parts):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            for signature, docstring in _documented(path):
                found.setdefault(docstring, Function(module, signature, docstring))
    return list(found.values())


def split_by_package(
    functions: Sequence[Function], held_out: float, seed: int
) -> tuple[list[Function], list[Function]]:
    """Split into training and held-out functions, shuffled; about a share of `held_out` packages is held out."""
    shuffle = random.Random(seed).shuffle
    packages = sorted({_package(function) for function in functions})
    shuffle(packages)
    kept_back = set(packages[: round(held_out * len(packages))])
    train = [function for function in functions if _package(function) not in kept_back]
    test = [function for function in functions if _package(function) in kept_back]
    shuffle(train)
    shuffle(test)
    return train, test


def _package(function: Function) -> str:
    return function.module.partition(".")[0]


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            docstring = " ".join(paragraph.split())
            signature = f"{node.name}({ast.unparse(node.args)})"
            if len(docstring.split()) in WORDS and len(signature) <= MAX_SIGNATURE:
                yield signature, docstring
