"""A tiny model, data, and one training by the command line, shared by the tests of a process."""

from pathlib import Path

import pytest
import torch
from command_line import TRAIN, Command, Place, Said
from tiny_checkpoint import save_table, save_tiny_model

from sylva_compile.cli.main import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line in this process."""

    def call(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a tiny Llama, a table, and the folder of a run whose blocks have moved."""
    folder = tmp_path_factory.mktemp("cli")
    model, table = save_tiny_model(folder / "model", chat=True), save_table(folder / "data.csv")
    out = folder / "run"
    code = main(
        [
            "finetune",
            "--model",
            str(model),
            "--data",
            str(table),
            "--column",
            "text",
            "--out",
            str(out),
            *TRAIN,
            "--every",
            "2",
            "--optimizer",
            "muon",
        ]
    )
    torch._dynamo.reset()
    assert code == 0
    return Place(model, table, out)
