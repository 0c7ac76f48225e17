import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.fx import Graph

from sylva_compile.passes.runner import run_passes

if TYPE_CHECKING:
    from tests.passes.conftest import Joint

aten = torch.ops.aten


def flip_signs(graph: Graph) -> int:
    nodes = graph.find_nodes(op="call_function", target=aten.neg.default)
    for node in nodes:
        node.target = aten.abs.default
    return len(nodes)


def nothing(graph: Graph) -> int:
    return 0


@pytest.fixture
def graph(joint: "Joint", monkeypatch: pytest.MonkeyPatch) -> Graph:
    monkeypatch.delenv("SYLVA_DISABLE_PASSES", raising=False)
    monkeypatch.delenv("SYLVA_DUMP_GRAPHS", raising=False)
    x = joint.input("primals_1", torch.zeros(3))
    joint.output(joint.call(aten.neg.default, joint.call(aten.neg.default, x)))
    return joint.graph


def targets(graph: Graph) -> set[object]:
    return {node.target for node in graph.nodes if node.op == "call_function"}


def test_counts_all_places_changed(graph: Graph) -> None:
    assert run_passes(graph, {"first": nothing, "flip_signs": flip_signs, "again": flip_signs}) == 2
    assert targets(graph) == {aten.abs.default}


def test_passes_run_in_the_order_given(graph: Graph) -> None:
    order: list[str] = []

    def noting(name: str) -> int:
        order.append(name)
        return 0

    run_passes(graph, {name: lambda _, name=name: noting(name) for name in ("c", "a", "b")})
    assert order == ["c", "a", "b"]


def test_no_passes_change_nothing(graph: Graph) -> None:
    assert run_passes(graph, {}) == 0


class TestDisabling:
    @pytest.mark.parametrize("value", ["flip_signs", "other, flip_signs", " flip_signs ,other"])
    def test_by_name(self, graph: Graph, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("SYLVA_DISABLE_PASSES", value)
        assert run_passes(graph, {"flip_signs": flip_signs}) == 0
        assert targets(graph) == {aten.neg.default}

    @pytest.mark.parametrize("value", ["", "other", "flip", "flip_signs_too"])
    def test_other_names_leave_it_on_and_are_said(
        self, graph: Graph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
    ) -> None:
        monkeypatch.setenv("SYLVA_DISABLE_PASSES", value)
        assert run_passes(graph, {"flip_signs": flip_signs}) == 2
        assert ("no pass is called" in caplog.text) == bool(value)

    def test_is_said(self, graph: Graph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("SYLVA_DISABLE_PASSES", "flip_signs")
        with caplog.at_level(logging.INFO, logger="sylva_compile.passes"):
            run_passes(graph, {"flip_signs": flip_signs})
        assert "flip_signs: disabled" in caplog.text


class TestLog:
    def test_number_name_count_and_difference(self, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sylva_compile.passes"):
            run_passes(graph, {"first": nothing, "flip_signs": flip_signs})
        [message] = caplog.messages
        assert message.startswith("pass 1 flip_signs: 2 rewritten in ")
        assert message.endswith("{'aten.abs.default': 2, 'aten.neg.default': -2}")

    def test_silent_by_default(self, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="sylva_compile.passes"):
            run_passes(graph, {"flip_signs": flip_signs})
        assert not caplog.messages


class TestDumps:
    def test_before_and_after_each_pass(self, graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        directory = tmp_path / "new" / "deep"
        monkeypatch.setenv("SYLVA_DUMP_GRAPHS", str(directory))
        run_passes(graph, {"first": nothing, "flip_signs": flip_signs})
        files = sorted(directory.iterdir())
        assert [file.name for file in files] == [
            "0000_0_first_before.txt",
            "0001_0_first_after.txt",
            "0002_1_flip_signs_before.txt",
            "0003_1_flip_signs_after.txt",
        ]
        texts = [file.read_text() for file in files]
        assert texts[0] == texts[1] == texts[2]
        assert "aten.neg" in texts[2]
        assert "aten.abs" in texts[3]
        assert texts[3] == str(graph)

    def test_a_second_graph_keeps_the_first_ones_files(
        self, graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("SYLVA_DUMP_GRAPHS", str(tmp_path))
        for _ in range(2):
            run_passes(graph, {"first": nothing})
        assert len(list(tmp_path.iterdir())) == 4

    def test_none_unless_asked_for(self, graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        run_passes(graph, {"flip_signs": flip_signs})
        assert not list(tmp_path.iterdir())

    def test_disabled_passes_leave_none(self, graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SYLVA_DUMP_GRAPHS", str(tmp_path))
        monkeypatch.setenv("SYLVA_DISABLE_PASSES", "first")
        run_passes(graph, {"first": nothing})
        assert not list(tmp_path.iterdir())
