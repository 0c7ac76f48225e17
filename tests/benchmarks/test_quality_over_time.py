"""Losses over time: which step has ended by when, and what is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_grid import grid_of_two

from benchmarks.quality import over_time
from benchmarks.quality.grid import Grid, Run, Settings
from benchmarks.quality.over_time import Curve, curve_of
from benchmarks.quality.tables import Line

GRID = grid_of_two([1e-3])


def row(run: Run, losses: list[float], step: float) -> dict[str, Any]:
    result = {
        "losses": losses,
        "beside_floor": {"step_ms": step * 10.0, "floor_ms": 10.0},
        "validation": {"loss": 1.0, "metric": 0.5},
    }
    return {"run": run.parts(), "result": result}


def line(*losses: list[float], step: float = 2.0) -> Line:
    run = Run("sst2", "full", {"kind": "full"}, Settings(), 1e-3, 0)
    return Line(run, 1e-3, [row(run, each, step) for each in losses])


def test_a_curve_is_a_running_mean_over_seeds() -> None:
    losses = [float(at) for at in range(20)]
    curve = curve_of(line(losses, [loss + 2 for loss in losses]))
    assert curve is not None
    # A tenth of the steps is two of them; the mean over seeds is one more than the first seed's.
    assert list(curve.losses) == [1.0, *(at + 0.5 for at in range(1, 20))]
    assert curve.times[:2] == [2.0, 4.0]
    assert [curve.at(time) for time in (1.9, 2.0, 5.9, 6.0, 1000)] == [None, 1.0, 1.5, 2.5, 19.5]


@pytest.mark.parametrize("spoil", [{"losses": None}, {"beside_floor": None}, {"losses": [1.0]}])
def test_lines_without_losses_have_no_curve(spoil: dict[str, Any]) -> None:
    found = line([1.0] * 20, [1.0] * 20)
    found.rows[1]["result"] |= spoil
    assert curve_of(found) is None


def test_equal_times_end_with_the_fastest() -> None:
    curves = [Curve("fast", 1.0, [4.0, 3.0, 2.0, 1.0]), Curve("slow", 2.0, [8.0, 6.0, 5.0, 4.0])]
    fast, slow = over_time.table(curves).splitlines()[2:]
    assert fast == "| fast | 1.00 | 4.000 | 3.000 | 1.000 | 1.000 |"
    assert slow == "| slow | 2.00 |  | 8.000 | 6.000 | 4.000 |"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.toml").write_text(GRID)
    command = ["--grid", str(tmp_path / "two.toml"), "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        over_time.main(command)
    assert "no line of two has kept losses" in capsys.readouterr().err
    grid = Grid.read(tmp_path / "two.toml")
    runs = [run for group in grid.groups() for run in grid.reported(group, 1e-3)]
    rows = [row(run, [1.0 / (1 + at) for at in range(20)], 1.0) for run in runs]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert over_time.main(command).count("| 1.00 |") == 2
    assert over_time.main([*command, "--methods", "linear"]).count("| 1.00 |") == 1
    assert (tmp_path / "two_time.png").stat().st_size > 0
    with pytest.raises(SystemExit):
        over_time.main([*command, "--methods", "moving"])


def test_times_of_steps_come_from_another_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, settings, step in (("two", "", 2.0), ("compiled", '[settings]\ncompile = "aot_eager"\n', 1.1)):
        path = tmp_path / f"{name}.toml"
        path.write_text(GRID + settings)
        grid = Grid.read(path)
        runs = [run for group in grid.groups() for run in grid.reported(group, 1e-3)]
        rows = [row(run, [1.0 / (1 + at) for at in range(20)], step) for run in runs]
        path.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = ["--grid", str(tmp_path / "two.toml"), "--results", str(tmp_path)]
    command += ["--costs", str(tmp_path / "compiled.toml")]
    assert over_time.main(command).count("| 1.10 |") == 2
    # Of the compiled runs only the first is left.
    (tmp_path / "compiled.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(SystemExit):
        over_time.main(command)
    assert "compiled has no row of 'linear'" in capsys.readouterr().err
