"""Tables of rows, and the documents that quote them."""

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from quality_inputs import GRIDS
from small_grid import fake_result, grid_file

from benchmarks.quality import run as quality
from benchmarks.quality import tables
from benchmarks.quality.grid import Grid
from benchmarks.quality.rows import FOLDER, Rows
from benchmarks.quality.runner import Runner


class TestTables:
    def test_a_grid_from_runs_to_tables(self, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        methods = (
            '{ full = { kind = "full" }, LoRA = { kind = "lora" }, random = { kind = "blocks", trace = "random" } }'
        )
        path = grid_file(tmp_path, tasks="{ sst2 = {} }", methods=methods, vary="{ sparsity = [0.8] }")
        command = ["--grid", str(path), "--results", str(tmp_path / "rows")]
        rows = quality.main([*command, "--data", str(data)])
        row = json.loads(rows.read_text().split("\n")[0])
        assert {"run", "result", "machine", "date"} <= set(row)
        assert {"commit", "versions", "processor", "threads"} <= set(row["machine"])
        text = tables.main(command)
        assert text.count("\n| full |") == 4
        for row in Rows(rows).read().values():
            assert row["result"]["peak_bytes"] > row["result"]["saved_bytes"]
            assert set(row["result"]["beside_floor"]) == {"floor_ms", "step_ms"}
            assert row["result"]["nonzero"] > 0.99
            assert (row["result"]["trace_bytes"] > 0) == (row["run"]["method"] == "random")
        assert "sparsity 0.8" in text
        assert text.strip() in capsys.readouterr().out
        assert (rows.parent / "tiny_sparsity.png").stat().st_size > 0

    def test_spreads_and_differences(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Runner, "do", lambda self, run: fake_result(run))
        path = grid_file(tmp_path)
        quality.main(["--grid", str(path), "--data", str(data), "--results", str(tmp_path / "rows")])
        grid = Grid.read(path)
        lines = tables.lines_of(grid, Rows(tmp_path / "rows" / "tiny.jsonl"))
        assert {(line.run.method, line.learning_rate) for line in lines} == {("head", 1e-2), ("random", 1e-3)}
        text = tables.markdown(grid, lines)
        assert "| head | 10 | 0.01 | 90.0 ± 0.0 | 0.600 ± 0.707 | +0.0 ± 0.0 | 2 |" in text
        # A measurement that no row has gets no column.
        assert "| head | 0.0 | 0.0 | 0.0 | 1 |" in text
        assert "peak" not in text
        assert "over random" in text
        assert "weights left" not in text

    def test_what_pruning_leaves_is_shown_where_somebody_prunes(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left = {"head": 1.0, "random": 0.05}
        monkeypatch.setattr(Runner, "do", lambda self, run: fake_result(run) | {"nonzero": left[run.method]})
        path = grid_file(tmp_path)
        rows = quality.main(["--grid", str(path), "--data", str(data), "--results", str(tmp_path / "rows")])
        grid = Grid.read(path)
        lines = tables.lines_of(grid, Rows(rows))
        text = tables.markdown(grid, lines)
        assert "| 5.0 |" in text
        assert "| 100.0 |" in text
        assert "weights left" not in tables.markdown(grid, [line for line in lines if line.run.method == "head"])

    def test_a_learning_rate_that_diverges_is_a_row_and_no_end(self, tmp_path: Path, data: Path) -> None:
        methods = '{ full = { kind = "full" }, head = { kind = "head" } }'
        rates = "[1e-3, 1e30]"
        path = grid_file(tmp_path, tasks="{ sst2 = {} }", methods=methods, learning_rates=rates, seeds="[0]")
        rows = quality.main(["--grid", str(path), "--data", str(data), "--results", str(tmp_path / "rows")])
        found = {(row["run"]["method"], row["run"]["learning_rate"]): row for row in Rows(rows).read().values()}
        assert len(found) == 4
        lost = found["full", 1e30]["result"]
        assert not math.isfinite(lost["loss"])
        assert math.isnan(lost["test"]["metric"])
        assert math.isnan(lost["validation"]["loss"])
        assert {line.learning_rate for line in tables.lines_of(Grid.read(path), Rows(rows))} == {1e-3}

    def test_text_between_comments_is_replaced_alone(self) -> None:
        grid = Grid.read(GRIDS / "small.toml")
        lines = tables.lines_of(grid, Rows(FOLDER / "small.jsonl"))
        text = "a\n<!-- quality small: begin -->\nold\n<!-- end -->\nb\n"
        assert tables.quoted(text, grid, lines) == text.replace("old\n", tables.markdown(grid, lines))
        bare = text.replace("small:", "small without costs:")
        assert tables.quoted(bare, grid, lines) == bare.replace("old\n", tables.markdown(grid, lines, costs=False))
        costs = text.replace("small:", "small costs alone:")
        assert tables.quoted(costs, grid, lines) == costs.replace("old\n", tables.markdown(grid, lines, quality=False))
        assert tables.quoted(text + bare, grid, lines) == "".join(tables.quoted(t, grid, lines) for t in (text, bare))
        other = text.replace("small", "long")
        assert tables.quoted(other, grid, lines) == other

    def test_comments_may_ask_for_some_methods(self) -> None:
        grid = Grid.read(GRIDS / "small.toml")
        lines = tables.lines_of(grid, Rows(FOLDER / "small.jsonl"))
        text = '<!-- quality small "full" "sylva, greedy": begin -->\nold\n<!-- end -->\n'
        some = [line for line in lines if line.run.method in ("full", "sylva, greedy")]
        assert tables.quoted(text, grid, lines) == text.replace("old\n", tables.markdown(grid, some))
        with pytest.raises(ValueError, match="asks for 'Full'; small has"):
            tables.quoted(text.replace("full", "Full"), grid, lines)

    def test_a_grid_that_no_document_asks_for_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = grid_file(tmp_path)
        with pytest.raises(SystemExit):
            tables.main(["--grid", str(path), "--results", str(tmp_path), "--readme"])
        assert "put '<!-- quality tiny: begin -->'" in capsys.readouterr().err

    def test_a_summary_has_a_line_for_every_value_and_a_column_for_every_method(self) -> None:
        grid = Grid.read(GRIDS / "pruner.toml")
        lines = tables.lines_of(grid, Rows(FOLDER / "pruner.jsonl"))
        text = tables.summary(grid, lines)
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if "|" in line]
        assert cells[0] == ["sparsity", "K-FAC pruner", "sylva, gain"]
        assert [row[0] for row in cells[2:]] == ["0.5", "0.8", "0.95"]
        for value, *found in cells[2:]:
            for method, cell in zip(grid.methods, found, strict=True):
                [line] = [
                    line for line in lines if (line.run.method, line.run.settings.sparsity) == (method, float(value))
                ]
                metric, loss = (statistics.mean(line.values("test", name)) for name in ("metric", "loss"))
                assert cell.startswith(f"{100 * metric:.1f} ± ")
                assert cell.endswith(f", {loss:.3f}")
        said = "<!-- quality pruner summary: begin -->\nold\n<!-- end -->\n"
        assert tables.quoted(said, grid, lines) == said.replace("old\n", text)
        assert tables.summary(Grid.read(GRIDS / "small.toml"), lines) == ""

    def test_a_summary_takes_the_seeds_that_all_lines_have(self) -> None:
        grid = Grid.read(GRIDS / "pruner.toml")
        lines = tables.lines_of(grid, Rows(FOLDER / "pruner.jsonl"))
        fewer = [replace(line, rows=line.rows[:2]) for line in lines]
        assert "; 3 seeds" in tables.summary(grid, lines)
        assert tables.summary(grid, [*lines[1:], fewer[0]]) == tables.summary(grid, fewer)
        assert "; 2 seeds" in tables.summary(grid, fewer)

    def test_costs_can_be_left_out(self) -> None:
        grid = Grid.read(GRIDS / "small.toml")
        lines = tables.lines_of(grid, Rows(FOLDER / "small.jsonl"))
        both, quality_alone = tables.markdown(grid, lines), tables.markdown(grid, lines, costs=False)
        costs_alone = tables.markdown(grid, lines, quality=False)
        assert both.startswith(quality_alone.rstrip())
        assert both.endswith(costs_alone.split("\n\n")[1])
        assert "loss" not in costs_alone
        assert "checkpoint" in both and "checkpoint" not in quality_alone

    @pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: "-".join(path.parts[-2:]))
    def test_documents_quote_the_rows_that_are_kept(self, document: Path) -> None:
        text = document.read_text()
        asked = re.findall(r"<!-- quality (\w+).*: begin -->", text)
        assert asked
        for name in set(asked):
            grid = Grid.read(GRIDS / f"{name}.toml")
            assert len(tables.places(grid).findall(text)) == asked.count(name)
            lines = tables.lines_of(grid, Rows(FOLDER / f"{name}.jsonl"))
            assert tables.quoted(text, grid, lines) == text

    @pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: "-".join(path.parts[-2:]))
    def test_documents_name_files_that_exist(self, document: Path) -> None:
        text = document.read_text()
        grids = set(re.findall(r"(\w+)\.toml", text)) - {"pyproject"}
        assert grids
        assert all((GRIDS / f"{name}.toml").exists() for name in grids)
        started = set(re.findall(r"python -m benchmarks\.quality\.(\w+)", text))
        assert {"run", "tables"} <= started or document.parent == GRIDS.parents[2]
        scripts = {*re.findall(r"benchmarks/quality/(\w+\.py)", text), *re.findall(r"`(\w+\.py)[`, ]", text)}
        assert all((GRIDS.parent / name).exists() for name in {*scripts, *(f"{name}.py" for name in started)})
        for link in re.findall(r"\]\(([^):]+)\)", text):
            assert (document.parent / link).exists()
