"""README.md and the pages are correct: their Python runs, and the files, commands, links and messages exist."""

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from pages import Block, run, runs_of, save_tiny_model

import sylva_compile
from benchmarks import memory_arithmetic, model_shapes
from sylva_compile.cli.main import build_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted(DOCS.rglob("*.md")),
    ROOT / "benchmarks" / "quality" / "README.md",
]
TEXT = "\n".join(page.read_text() for page in PAGES)
RUNS = [blocks for page in PAGES for blocks in runs_of(page)]
PROGRAMS = {"python", "pip", "make", "torchrun", ".ci/run", "sylva-compile"}
YOURS = {"train.py"}
"""Files of the reader's own."""


def name_of(blocks: list[Block]) -> str:
    return f"{blocks[0].page.relative_to(ROOT)}:{blocks[0].line}"


def text_of_tests() -> str:
    """Return the text of all test files, one after another."""
    return "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.filterwarnings(
    # TRL calls names of gradient checkpointing that transformers is about to rename.
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    # The Trainer asks for pinned memory, wherever it runs.
    "ignore:'pin_memory' argument is set as true:UserWarning",
)
@pytest.mark.parametrize("blocks", RUNS, ids=name_of)
def test_python_runs_from_top_to_bottom(blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Trainers look for programs to report to unless they run under a CI.
    monkeypatch.setenv("CI", "1")
    if any("path/to/model" in block.code for block in blocks):
        save_tiny_model(tmp_path / "path" / "to" / "model")
    names = run(blocks)
    if "backend" in names:
        names["model"](**names["batch"]).loss.backward()
        assert names["backend"].report().rewritten == 14


def test_every_page_with_python_is_run() -> None:
    assert {blocks[0].page.name for blocks in RUNS} >= {"README.md", "start.md", "recipes.md", "choosing.md"}
    assert sum(map(len, RUNS)) == TEXT.count("```python")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|benchmarks)/(?:\w+/)*\w+\.py", TEXT))))
def test_named_scripts_exist_and_are_tested(path: str) -> None:
    assert (ROOT / path).exists()
    stem = Path(path).stem
    assert re.search(rf"import.*\b{stem}\b|{stem}\.py", text_of_tests())


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks(?:\.\w+)+)", TEXT))))
def test_named_modules_exist_and_are_tested(module: str) -> None:
    assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists()
    package, _, name = module.rpartition(".")
    assert re.search(rf"from {re.escape(package)} import .*\b{name}\b", text_of_tests())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.MULTILINE))))
def test_named_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_environment_variables_are_read_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "sylva_compile").rglob("*.py"))
    for name in set(re.findall(r"SYLVA_[A-Z_]+", TEXT)):
        assert name in source


def shell_commands() -> list[str]:
    """Return the commands of all pages, each once; one that goes on over several lines is one."""
    texts = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    return sorted({line for text in texts for line in re.sub(r"\\\n\s*", "", text).splitlines()})


@pytest.mark.parametrize("line", shell_commands())
def test_shell_commands_exist(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    assert program in PROGRAMS
    if program == "sylva-compile" and "--config" not in arguments:
        build_parser()[0].parse_args(arguments)
    if program == ".ci/run":
        assert (ROOT / program).exists()
    if program == "pip":
        assert arguments[0] == "install"
        extras = re.findall(r"\[(.+?)\]", line)
        assert all(
            re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras
        )
    if program == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None
    for argument in arguments:
        if argument.endswith((".py", ".toml")) and argument not in YOURS:
            assert (ROOT / argument).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^):#]+)[^):]*\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.MULTILINE)


def test_the_reference_names_every_module_of_public_names() -> None:
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    modules = {name for name in sylva_compile.__all__ if isinstance(getattr(sylva_compile, name), ModuleType)}
    for name in modules:
        assert f"automodule:: sylva_compile.{name}\n" in text


def test_the_table_of_folders_has_each_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    folders = {path.name for path in (ROOT / "sylva_compile").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders == set(rows)
    assert len(rows) == len(folders)


def literals() -> list[str]:
    """Return the strings in the source of the package, with "…" for what is put into them."""
    found = []
    for path in (ROOT / "sylva_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[a-z]", "…", node.value).replace("%%", "%"))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return [" ".join(text.split()) for text in found]


MESSAGES = re.findall(r"\*\*`([^`]+)`\*\*", (DOCS / "troubleshooting.md").read_text())


def test_messages_that_are_explained_exist() -> None:
    assert len(MESSAGES) > 30
    known = literals()
    for message in MESSAGES:
        said = " ".join(message.split())
        # A name before the message may be put in whole, so that the literal begins after it.
        assert any(said in text or said.replace("…", "") in text.replace("…", "") for text in known), message


def test_worked_numbers_of_the_memory_page() -> None:
    text = (DOCS / "memory.md").read_text()
    model = model_shapes.MODELS["Llama-3-8B"]
    config = sylva_compile.SylvaConfig(sparsity=0.95)
    found = memory_arithmetic.count(model, config, memory_arithmetic.STATES["AdamW"])
    for value in (model.parameters(), model.masked(), memory_arithmetic.trainable(model, config)):
        assert f"{value:,}" in text
    for count in (found.weights, found.blocks, found.states, found.device, found.originals):
        assert memory_arithmetic.gib(count) in text
