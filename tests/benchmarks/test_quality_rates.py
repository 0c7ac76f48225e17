"""Learning rates: how wide the range of good ones is, and what the command reads from rows."""

import json
import math
from pathlib import Path

import pytest
from small_grid import grid_of_two

from benchmarks.quality import rates
from benchmarks.quality.grid import Grid

GRID = grid_of_two([1e-3, 1e-2, 1e-1])


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-3: 2.0, 1e-2: 1.0, 1e-1: 2.0}, (1.0, False)),
        ({1e-3: 1.04, 1e-2: 1.0, 1e-1: 2.0, 1.0: 2.0}, (10.0, True)),
        ({1e-3: 2.0, 1e-2: 1.0, 1e-1: 1.04, 1.0: 2.0}, (10.0, False)),
        # Good rates beyond a bad one are no part of the range.
        ({1e-3: 1.0, 1e-2: 2.0, 1e-1: 1.0}, (1.0, True)),
        ({1e-3: 1.0, 1e-2: 1.0, 1e-1: math.inf}, (10.0, True)),
    ],
)
def test_the_range_of_good_rates(losses: dict[float, float], expected: tuple[float, bool]) -> None:
    factor, open_ended = rates.good(losses, 0.05)
    assert (pytest.approx(factor), open_ended) == expected


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "three.toml").write_text(GRID)
    command = ["--grid", str(tmp_path / "three.toml"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        rates.main(command)
    assert "no run of three has a row" in capsys.readouterr().err
    grid = Grid.read(tmp_path / "three.toml")
    full = next(group for group in grid.groups() if group.method == "full")
    losses = {1e-3: 1.5, 1e-2: 1.0, 1e-1: math.nan}
    rows = [
        {"run": run.parts(), "result": {"validation": {"loss": loss + seed, "metric": 0.5}}}
        for rate, loss in losses.items()
        for seed, run in enumerate(grid.reported(full, rate))
    ]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    # The second seed chooses nothing, and a method without a row has no line.
    assert rates.main(command).splitlines()[-1] == "| full | 0.01 | 1.000 | 1 | 3 |"
    assert (tmp_path / "three_rates.png").stat().st_size > 0
