"""Rows of a grid are kept, whatever interrupts it."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_grid import fake_result, grid_file

from benchmarks.quality import run as quality
from benchmarks.quality import tables
from benchmarks.quality.grid import Grid, Run, Settings
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.quality.runner import Runner


class TestRows:
    def test_an_interrupted_grid_goes_on_and_rewrites_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
    ) -> None:
        done: list[str] = []

        def do(self: Runner, run: Run) -> dict[str, Any]:
            if len(done) == 5:
                raise KeyboardInterrupt
            done.append(run.key())
            return fake_result(run)

        monkeypatch.setattr(Runner, "do", do)
        command = ["--grid", str(grid_file(tmp_path)), "--data", str(data), "--results", str(tmp_path / "rows")]
        with pytest.raises(KeyboardInterrupt):
            quality.main(command)
        path = tmp_path / "rows" / "tiny.jsonl"
        first = path.read_bytes()
        assert first.count(b"\n") == 5
        # A power failure can leave such a partial line.
        with path.open("ab") as file:
            file.write(b'{"run": {"ta')
        monkeypatch.setattr(Runner, "do", lambda self, run: done.append(run.key()) or fake_result(run))
        quality.main(command)
        assert path.read_bytes().startswith(first)
        # Two tasks and two methods have three runs each: two learning rates, and the chosen one at the second seed.
        assert len(done) == len(set(done)) == len(Rows(path).read()) == 12
        whole = path.read_bytes()
        quality.main(command)
        assert path.read_bytes() == whole

    def test_what_another_grid_has_done_is_not_done_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
    ) -> None:
        monkeypatch.setattr(Runner, "do", lambda self, run: fake_result(run))
        command = ["--data", str(data), "--results", str(tmp_path / "rows")]
        quality.main(["--grid", str(grid_file(tmp_path)), *command])
        methods = '{ random = { kind = "blocks", trace = "random" }, LoRA = { kind = "lora" } }'
        larger = grid_file(tmp_path, methods=methods).rename(tmp_path / "larger.toml")
        rows = quality.main(["--grid", str(larger), *command])
        assert {json.loads(line)["run"]["method"] for line in rows.read_text().splitlines()} == {"LoRA"}
        shown = tables.lines_of(Grid.read(larger), Rows(rows))
        assert {line.run.method for line in shown} == {"random", "LoRA"}

    def test_time_that_is_up_begins_no_run(self, tmp_path: Path, data: Path) -> None:
        command = ["--grid", str(grid_file(tmp_path)), "--data", str(data), "--results", str(tmp_path / "rows")]
        path = quality.main([*command, "--minutes", "-1"])
        assert not path.exists()

    def test_parts_make_the_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
        monkeypatch.setattr(Runner, "do", lambda self, run: fake_result(run))
        command = ["--grid", str(grid_file(tmp_path)), "--data", str(data), "--results", str(tmp_path / "rows")]
        counts = [len(Rows(quality.main([*command, "--part", part])).read()) for part in ("1/2", "2/2", "1/1")]
        assert counts == [6, 12, 12]
        with pytest.raises(SystemExit):
            quality.main([*command, "--part", "3/2"])

    def test_a_method_can_be_run_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(Runner, "do", lambda self, run: fake_result(run))
        command = ["--grid", str(grid_file(tmp_path)), "--data", str(data), "--results", str(tmp_path / "rows")]
        rows = Rows(quality.main([*command, "--methods", "head", "--task", "sst2"])).read().values()
        assert {(row["run"]["method"], row["run"]["task"]) for row in rows} == {("head", "sst2")}
        assert len(rows) == 3
        with pytest.raises(SystemExit):
            quality.main([*command, "--methods", "LoRA"])
        assert "tiny has no method 'LoRA'; it has 'head', 'random'" in capsys.readouterr().err

    def test_processes_share_a_grid(self, tmp_path: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
        methods = '{ head = { kind = "head" }, random = { kind = "blocks", trace = "random" } }'
        grid = grid_file(tmp_path, tasks="{ sst2 = {} }", methods=methods, learning_rates="[1e-3]", seeds="[0, 1]")
        command = ["--grid", str(grid), "--data", str(data), "--results", str(tmp_path / "rows"), "--processes", "2"]
        # The test reads the lines of the file, because `Rows.read` would return only one of two equal rows.
        runs = [json.loads(line)["run"] for line in quality.main(command).read_text().splitlines()]
        assert sorted((run["method"], run["seed"]) for run in runs) == [
            (method, seed) for method in ("head", "random") for seed in (0, 1)
        ]
        with pytest.raises(SystemExit):
            quality.main([*command, "--part", "1/2"])
        with pytest.raises(SystemExit, match="2 of 2 processes failed"):
            quality.main([*command, "--data", str(tmp_path), "--results", str(tmp_path / "others")])
        assert "sst2" in capfd.readouterr().err

    def test_rows_that_are_kept_have_the_keys_of_their_runs(self) -> None:
        for key, row in Rows(FOLDER / "small.jsonl").read().items():
            said = row["run"]
            settings = Settings(**said["settings"])
            run = Run(said["task"], said["method"], said["options"], settings, said["learning_rate"], said["seed"])
            assert run.key() == key

    def test_of_equal_runs_the_first_row_stands(self, tmp_path: Path) -> None:
        rows = Rows(tmp_path / "new" / "rows.jsonl")
        rows.append({"seed": 0}, result=1)
        rows.append({"seed": 0}, result=2)
        rows.append({"seed": 1}, result=3)
        assert [row["result"] for row in rows.read().values()] == [1, 3]
