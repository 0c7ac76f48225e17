"""The settings of the pages: `make docs` builds them without a network."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sylva_compile.version import __version__

project = "sylva_compile"
author = "the sylva_compile authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"sylva_compile {version}"
html_static_path = ["_static"]
# The theme would take its buttons' links from a host of the sources, and the project has no fixed one.
html_show_sourcelink = False

myst_heading_anchors = 3

# Docstrings mark code by single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_ROOMS = ("sylva_compile", *(f"sylva_compile.{room}" for room in ("optim", "schedules", "reports", "integrations")))

# No inventory of another project is read, since that needs a network: their names are no links.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|transformers|accelerate|collections|typing|numpy|matplotlib|sympy|huggingface_hub|os|pathlib|nn)\b.*",
    ),
    # Bases that classes of users share, and the layout of values, which no user names.
    ("py:class", r"sylva_compile\.(embedded|nm\.(pickled|layout))\..*"),
]


def _public_names() -> dict[str, str]:
    """Map the full name of each public class and function to the name that users import."""
    found = {}
    for room in _ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(f"{value.__module__}.{value.__qualname__}", f"{room}.{name}")
    return found


def _link_to_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element
) -> nodes.Element | None:
    """Let a type in a signature, which has the name of its module, lead to the public name."""
    public = _PUBLIC.get(str(node.get("reftarget")))
    if public is None or node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, contnode)


def _mark_examples(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put `::` before indented code, which docstrings show without a mark."""
    marked: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        earlier = next((text for text in reversed(lines[:number]) if text), "")
        deeper = _indent(line) >= _indent(earlier) + 4 and not re.match(r"\s*([*-]|\d+\.) ", earlier)
        if line and not before and earlier and deeper and not earlier.rstrip().endswith("::"):
            marked += [" " * _indent(earlier) + "::", ""]
        # "b." alone would begin a list.
        marked.append(re.sub(r": ([a-z])\.$", r": \\\1.", line))
    lines[:] = marked


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    # Before napoleon, which reads sections.
    app.connect("autodoc-process-docstring", _mark_examples, priority=400)
    app.connect("missing-reference", _link_to_public_name)


_PUBLIC = _public_names()
