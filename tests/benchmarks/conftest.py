"""Data that tests of the quality harness read."""

import itertools
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write SST-2 and CoLA in the layout of the real files; the word "good" or "bad" decides the label."""
    folder = tmp_path_factory.mktemp("data")
    sentences = [
        (" ".join(words), int(words[0] == "good"))
        for words in itertools.product(("good", "bad"), ("old", "new", "red"), ("cat", "dog", "man", "sea"), "abcdef")
    ]
    for task, line in (("sst2", "{0}\t{1}\n"), ("cola", "x\t{1}\t\t{0}\n")):
        (folder / task).mkdir()
        names = {"sst2": ("train.tsv", "dev.tsv"), "cola": ("in_domain_train.tsv", "in_domain_dev.tsv")}[task]
        (folder / task / names[0]).write_text("".join(line.format(*pair) for pair in sentences))
        (folder / task / names[1]).write_text("".join(line.format("the " + text, label) for text, label in sentences))
    return folder
