import subprocess
import sys
from pathlib import Path

import pytest

from sylva_compile.cli.config_file import read_config_file
from sylva_compile.cli.main import COMMANDS, build_parser, main
from sylva_compile.errors import InputError, UsageError
from sylva_compile.version import __version__

MODEL = ["--model", "model"]
ADAPTER = [*MODEL, "--adapter", "adapter", "--out", "out"]
WRONG_USAGE = [
    ([], "are required: COMMAND"),
    (["tune"], "invalid choice: 'tune'"),
    (["--verbose"], "are required: COMMAND"),
    (["finetune"], "the following arguments are required: --model"),
    (["finetune", *MODEL], "--data is missing"),
    (["finetune", *MODEL, "--data", "x", "--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    (["finetune", *MODEL, "--data", "x", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["finetune", *MODEL, "--data", "x", "--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
    (["finetune", *MODEL, "--data", "x", "--lr", "-1"], "lr=-1.0; use a number above 0"),
    (["finetune", *MODEL, "--data", "x", "--batch-size", "0"], "batch_size=0; use a number above 0"),
    (["finetune", *MODEL, "--data", "x", "--every", "-1"], "every=-1; use a number from 0 on"),
    (["finetune", *MODEL, "--data", "x", "--choose", "cycle"], "give --every, too"),
    (["finetune", *MODEL, "--data", "x", "--held-out", "1"], "held_out=1.0; use a share"),
    (["finetune", *MODEL, "--data", "x", "--sparsity", "2"], "sparsity=2.0"),
    (["finetune", *MODEL, "--data", "x", "--seed", "-1"], "seed=-1; use a number from 0"),
    (["finetune", *MODEL, "--data", "x", "--seed", str(2**32)], "seed=4294967296; use a number from 0"),
    (["finetune", *MODEL, "--data", "x", "--response", "a"], "--prompt-template is missing"),
    (["finetune", *MODEL, "--data", "x", "--prompt-template", "a"], "--response is missing"),
    (
        ["finetune", *MODEL, "--data", "x", "--column", "a", "--prompt-template", "b", "--response", "c"],
        "--column and --response exclude each other",
    ),
    (["trace", *MODEL], "--data is missing, which --method sylva needs"),
    (["trace", *MODEL, "--method", "best"], "argument --method: invalid choice: 'best'"),
    (["trace", *MODEL, "--block-size", "4"], "block_size=4"),
    (["inspect"], "the following arguments are required: PATH"),
    (["inspect", "a", "b"], "unrecognized arguments: b"),
    (["inspect", "a", "--json=yes"], "argument --json"),
    (["report", *MODEL], "the following arguments are required: --adapter"),
    (["report", *MODEL, "--adapter"], "argument --adapter: expected one argument"),
    (["report", *MODEL, "--adapter", "a", "--format", "pdf"], "unrecognized arguments: --format pdf"),
    (["merge", *MODEL], "the following arguments are required: --adapter, --out"),
    (["merge", *ADAPTER, "--format", "dense"], "unrecognized arguments: --format dense"),
    (["merge", *ADAPTER, "--out"], "argument --out: expected one argument"),
    (["export", *ADAPTER, "--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
    (["export", *MODEL], "the following arguments are required: --adapter, --out"),
    (["export", *ADAPTER, "more"], "unrecognized arguments: more"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exits_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_readable_at_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert COMMANDS[name].help[1:] in " ".join(text.split())
    for action in build_parser()[1][name]._actions:
        assert action.help, action.dest


def test_the_list_of_commands_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from sylva_compile.cli.main import main; main(['finetune', '--help']); main(['inspect'])"
    code += "; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "sylva_compile", "merge"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("error: the following arguments are required")


class TestConfigFile:
    """`--config` gives defaults that the command line overrides."""

    KNOWN = ("block_size", "bf16", "scope", "lr", "sparsity")

    def read(self, folder: Path, text: str) -> list[str]:
        (folder / "options.yaml").write_text(text)
        return read_config_file(folder / "options.yaml", self.KNOWN)

    def test_entries_become_arguments(self, tmp_path: Path) -> None:
        text = "block-size: 32\nbf16: true\nscope: [q_proj, v_proj]\nlr: 1e-3\nsparsity:\n"
        expected = ["--block-size=32", "--bf16", "--scope", "q_proj", "v_proj", "--lr=1e-3"]
        assert self.read(tmp_path, text) == expected
        assert self.read(tmp_path, "bf16: no") == ["--no-bf16"]
        assert self.read(tmp_path, "# nothing\n") == []

    @pytest.mark.parametrize(
        ("text", "error", "message"),
        [
            ("blocksize: 1", UsageError, "unknown key 'blocksize'; did you mean 'block_size'"),
            ("lr: {a: 1}", UsageError, "lr holds a mapping"),
            ("- lr", InputError, "holds a list"),
            ("lr: [", InputError, "is no YAML"),
        ],
    )
    def test_what_it_refuses(self, tmp_path: Path, text: str, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            self.read(tmp_path, text)

    def test_the_command_line_wins(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "options.yaml"
        path.write_text("model: nowhere/at/all\ndata: nothing.txt\nlr: -1\n")
        assert main(["finetune", "--config", str(path)]) == 2
        assert "lr=-1.0" in capsys.readouterr().err
        assert main(["finetune", f"--config={path}", "--lr", "1"]) == 1
        assert "--data nothing.txt is no file" in capsys.readouterr().err

    def test_an_unknown_key_exits_with_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "options.yaml").write_text("modl: a\n")
        assert main(["merge", "--config", str(tmp_path / "options.yaml")]) == 2
        assert "unknown key 'modl'; did you mean 'model'" in capsys.readouterr().err
        (tmp_path / "options.yaml").write_text("path: a\n")
        assert main(["inspect", "--config", str(tmp_path / "options.yaml")]) == 2
        assert "unknown key 'path'" in capsys.readouterr().err
        assert main(["merge", "--config", str(tmp_path / "none.yaml")]) == 1
        assert "none.yaml cannot be read" in capsys.readouterr().err
