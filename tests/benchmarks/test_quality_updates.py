"""Changes of weights by several methods: the figures of a comparison, and the command on a tiny model."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.quality import updates
from benchmarks.quality.grid import Grid
from benchmarks.quality.updates import compare

GRID = """
learning_rates = [1e-2]
seeds = [0, 1]
[settings]
model = "tiny"
train = 16
validation = 8
batch = 8
epochs = 1
head_steps = 1
sparsity = 0.8
block_size = 8
[tasks]
sst2 = {}
[methods]
"linear" = { kind = "linear" }
"LoRA" = { kind = "lora" }
"random" = { kind = "blocks", trace = "random" }
"""


def test_the_figures() -> None:
    reference = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.zeros(1, 2)}
    # Half of the reference, at one of its two places.
    found = compare({"a": torch.tensor([[0.0, 0.0], [0.0, 2.0]]), "b": torch.zeros(1, 2)}, reference)
    assert found.size == pytest.approx(2 / 5)
    assert found.cosine == pytest.approx(8 / (2 * 5))
    assert found.rank == 1.0
    assert found.touched == 1 / 6
    assert found.reach == pytest.approx(16 / 25)
    assert compare(reference, reference).rank == pytest.approx(25 / 16)
    nothing = compare({name: torch.zeros_like(each) for name, each in reference.items()}, reference)
    assert (nothing.size, nothing.cosine, nothing.rank, nothing.reach) == (0, 0, 0, 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 64), ("dev", 8)):
        lines = "".join(f"the film number {at} is {'good' if at % 2 else 'bad'}\t{at % 2}\n" for at in range(count))
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (tmp_path / "sst2" / f"{name}.tsv").write_text(lines)
    path = tmp_path / "three.toml"
    path.write_text(GRID)
    grid = Grid.read(path)
    done = [run for group in grid.groups() for run in grid.reported(group, 1e-2) if group.method != "LoRA"]
    rows = [{"run": run.parts(), "result": {"validation": {"loss": 1.0, "metric": 0.5}}} for run in done]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--grid", str(path), "--data", str(tmp_path), "--results", str(tmp_path), "--reference", "linear"]
    with pytest.raises(SystemExit):
        updates.main([*command, "--methods", "LoRA"])
    assert "three has no tuned line 'LoRA' of sst2; it has" in capsys.readouterr().err
    linear, again, random = updates.main([*command, "--methods", "random"]).splitlines()[2:]
    assert re.fullmatch(r"\| linear \| 1\.00 \| 1\.000 \| .* \| 100\.0% \|", linear)
    assert again.startswith("| linear, another seed |")
    touched = float(random.split("|")[5].strip(" %"))
    assert 0 < touched < 25 < float(again.split("|")[5].strip(" %"))
