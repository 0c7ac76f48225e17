"""Grid files, and the learning rates that a walk tries."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quality_inputs import GRIDS
from small_grid import grid_file

from benchmarks.quality.grid import Grid, GridError, best_learning_rate


class TestGrid:
    def test_the_best_learning_rate_is_that_of_the_validation(self) -> None:
        rows = [
            {"run": {"learning_rate": rate}, "result": {"validation": {"metric": metric, "loss": loss}}}
            for rate, metric, loss in ((1, 0.5, 0.1), (2, 0.9, 0.3), (3, 0.9, 0.2))
        ]
        assert best_learning_rate(rows) == 3
        assert best_learning_rate(rows, "loss") == 1
        rows[0]["run"]["learning_rate"], rows[0]["result"]["validation"]["metric"] = 4, float("nan")
        assert best_learning_rate(rows) == 3
        rows[0]["result"]["validation"]["loss"] = float("nan")
        assert best_learning_rate(rows, "loss") == 3

    @pytest.mark.parametrize(
        ("best", "tried"), [(3, [2, 3, 4]), (5, [2, 3, 4, 5, 6]), (0, [0, 1, 2, 3]), (6, [2, 3, 4, 5, 6])]
    )
    def test_a_walk_ends_where_the_best_learning_rate_has_tried_neighbours(
        self, tmp_path: Path, best: int, tried: list[int]
    ) -> None:
        rates = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        grid = Grid.read(grid_file(tmp_path, learning_rates=str(rates), walk="true"))
        line = next(grid.groups())
        rows: dict[str, Any] = {}
        while missing := [run for run in grid.tuning(line, rows) if run.key() not in rows]:
            for run in missing:
                loss = abs(rates.index(run.learning_rate) - best)
                result = {"validation": {"metric": -loss, "loss": loss}}
                rows[run.key()] = {"run": run.parts(), "result": result}
        found = [run.learning_rate for run in grid.tuning(line, rows)]
        assert found == [rates[at] for at in tried]
        # Rows of rates that the walk would not have tried take part in the choice.
        every = replace(grid, walk=False).tuning(line, rows)
        assert [run.learning_rate for run in every] == rates

    def test_a_walk_begins_around_the_rate_that_a_method_names(self, tmp_path: Path) -> None:
        path = grid_file(
            tmp_path, learning_rates="[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]", walk="true", walk_from="{ head = 2.0 }"
        )
        tried = {
            line.method: [run.learning_rate for run in grid.tuning(line, {})]
            for grid in [Grid.read(path)]
            for line in grid.groups()
        }
        assert tried.pop("head") == [2.0]
        assert all(rates == [4.0] for rates in tried.values())

    @pytest.mark.parametrize(
        ("said", "problem"),
        [
            ({"walk_from": "{ head = 1.0 }"}, "walk_from without walk = true"),
            ({"walk": "true", "walk_from": "{ nobody = 1.0 }"}, "walk_from names 'nobody'"),
            ({"walk": "true", "walk_from": "{ head = 7.0 }"}, "7.0 is not one of learning_rates"),
        ],
    )
    def test_a_walk_begins_at_no_unknown_place(self, tmp_path: Path, said: dict[str, str], problem: str) -> None:
        with pytest.raises(GridError, match=problem):
            Grid.read(grid_file(tmp_path, learning_rates="[1.0, 2.0]", **said))

    @pytest.mark.parametrize(("choose_by", "tried"), [("metric", [0, 1, 2, 3]), ("loss", [2, 3, 4])])
    def test_a_walk_goes_on_where_all_answers_are_the_same(
        self, tmp_path: Path, choose_by: str, tried: list[int]
    ) -> None:
        rates = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        path = grid_file(tmp_path, learning_rates=str(rates), walk="true", choose_by=f'"{choose_by}"')
        grid, rows = Grid.read(path), dict[str, Any]()
        line = next(grid.groups())
        while missing := [run for run in grid.tuning(line, rows) if run.key() not in rows]:
            for run in missing:
                # From the third rate on nothing is learnt, and the loss wavers.
                loss = abs(run.learning_rate - 4.0)
                result = {"validation": {"metric": 0.8 if run.learning_rate < 3.0 else 0.5, "loss": loss}}
                rows[run.key()] = {"run": run.parts(), "result": result}
        assert [run.learning_rate for run in grid.tuning(line, rows)] == [rates[at] for at in tried]

    def test_what_a_method_does_not_look_at_makes_no_new_run(self, tmp_path: Path) -> None:
        path = grid_file(tmp_path, vary="{ sparsity = [0.5, 0.9, 0.95], samples = [16] }")
        groups = list(Grid.read(path).groups())
        counts = {
            (task, method): sum((run.task, run.method) == (task, method) for run in groups)
            for task in ("sst2", "cola")
            for method in ("head", "random")
        }
        assert counts == {(task, method): {"head": 1, "random": 3}[method] for task, method in counts}

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("tasks", "{ nothing = {} }"),
            ("settings", "{ blocksize = 8 }"),
            ("methods", '{ a = { kind = "blocks" } }'),
            ("colour", "1"),
        ],
    )
    def test_names_that_mean_nothing_are_refused(self, tmp_path: Path, name: str, value: str) -> None:
        with pytest.raises(GridError, match="use"):
            Grid.read(grid_file(tmp_path, **{name: value}))

    @pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
    def test_the_grids_that_are_there_can_be_read(self, path: Path) -> None:
        grid = Grid.read(path)
        assert len(list(grid.groups())) > 1
        assert len(grid.seeds) >= 2
