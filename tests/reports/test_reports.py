"""Reports: the changes of blocks against a dense difference, the curves of a log, the pictures and the page."""

import copy
import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tiny_models import tiny
from torch import nn

import sylva_compile
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import EmbedError, ReportError
from sylva_compile.reports import History, changes_of, heat_maps, history_of, read_history, write_report
from sylva_compile.reports.pictures import curves, shares_by_kind, shares_by_layer
from sylva_compile.schedules import MovingBlocks

LOG = [
    {"step": 10, "loss": 3.0, "schedule": {"moves": 1, "places": 0.3, "importance": {"h.0": 0.1, "h.1": -0.2}}},
    {"step": 20, "loss": 2.0, "schedule": {"moves": 2, "places": 0.5, "importance": {"h.0": 0.2, "h.1": -0.1}}},
    {"step": 20, "eval_loss": 2.5},
    {"step": 20, "train_runtime": 1.0},
]


def trained(architecture: str, moves: int) -> tuple[nn.Module, nn.Module]:
    """Return a model whose blocks have trained and moved, and its base. Its weights end in the middle of a block."""
    model = tiny(architecture).model.requires_grad_(False)
    base = copy.deepcopy(model)
    masks = sylva_compile.trace_and_mask(model, method="random", block_size=20, sparsity=0.5)
    masks.embed(model)
    schedule = MovingBlocks(masks, every=1)
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    for _ in range(moves + 1):
        for parameter in masks.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        if moves:
            schedule.step()
        optimizer.zero_grad()
    return model, base


class TestChanges:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("moves", [0, 2])
    def test_they_are_those_of_the_dense_weights(self, architecture: str, moves: int) -> None:
        model, base = trained(architecture, moves)
        found = changes_of(model)
        assert len(found) == len({each.name for each in found}) > 7
        for each in found:
            difference = (model.get_parameter(each.name) - base.get_parameter(each.name)).detach().double()
            b = each.block_size
            assert each.squares == pytest.approx(float(difference.square().sum()), rel=1e-6)
            for row in range(each.change.shape[0]):
                for column in range(each.change.shape[1]):
                    block = difference[row * b : (row + 1) * b, column * b : (column + 1) * b]
                    value = float(each.change[row, column])
                    if value == value:
                        assert value == pytest.approx(float(block.square().mean().sqrt()), rel=1e-6)
                    else:
                        assert not bool(block.any())
            assert each.trained >= int(each.present.sum())
        moved = sum(each.trained for each in found) > sum(int(each.present.sum()) for each in found)
        assert moved == (moves > 0)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_blocks_that_diverged_are_trained_ones(self, value: float) -> None:
        model, _ = trained("llama", 0)
        state = next(iter(block_states(model).values()))
        with torch.no_grad():
            state.blocks[0] = value
        found = changes_of(model)
        assert found[0].trained == state.mask.nnz
        assert int(found[0].change.isinf().sum()) == 1
        finite = max(float(each.change[each.change.isfinite()].max()) for each in found)
        image = heat_maps(found).axes[0].images[0]
        assert image.get_clim() == (0.0, finite)
        assert int(np.ma.getmaskarray(image.get_array()[: found[0].change.shape[0]]).sum()) == int(
            found[0].change.isnan().sum()
        )

    def test_the_base_that_is_shown_is_refused(self) -> None:
        model, _ = trained("llama", 0)
        with sylva_compile.disable_adapter(model), pytest.raises(EmbedError, match="shows its base"):
            changes_of(model)

    def test_a_model_without_blocks(self) -> None:
        with pytest.raises(EmbedError, match="no blocks"):
            changes_of(nn.Linear(4, 4))


class TestHistory:
    def test_the_curves_of_a_log(self) -> None:
        found = history_of(LOG)
        assert found.loss == [(10, 3.0), (20, 2.0)]
        assert found.held_out == [(20, 2.5)]
        assert found.moves == [(10, 1.0), (20, 2.0)]
        assert found.places == [(10, 0.3), (20, 0.5)]
        assert found.importance == {"h.0": [(10, 0.1), (20, 0.2)], "h.1": [(10, -0.2), (20, -0.1)]}

    def test_it_is_found_in_the_newest_checkpoint_or_beside(self, tmp_path: Path) -> None:
        for number in (9, 10):
            (tmp_path / f"checkpoint-{number}").mkdir()
            log = [{"step": number, "loss": 1.0}]
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        assert read_history(tmp_path).loss == [(10, 1.0)]
        assert read_history(tmp_path / "checkpoint-9").loss == [(9, 1.0)]

    def test_without_a_log_or_with_another_file(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="There is no trainer_state"):
            read_history(tmp_path / "a" / "b")
        (tmp_path / "trainer_state.json").write_text("[]")
        with pytest.raises(ReportError, match="damaged"):
            read_history(tmp_path)


class TestPictures:
    def test_every_kind_and_curve_is_drawn(self) -> None:
        changes = changes_of(trained("llama", 1)[0])
        maps = heat_maps(changes)
        assert len(maps.axes) == 7 + 1
        many = {f"h.{at}": [(1, 0.0), (2, float(at))] for at in range(12)}
        figures = [maps, shares_by_kind(changes), shares_by_layer(changes), curves(many, "score")]
        assert all(isinstance(figure, Figure) for figure in figures)
        for figure in figures:
            figure.canvas.draw()

    def test_the_colours_are_named_inside_of_the_picture(self) -> None:
        maps = heat_maps(changes_of(trained("llama", 0)[0]))
        maps.canvas.draw()
        label = maps.axes[-1].yaxis.label.get_window_extent()
        assert maps.bbox.y0 <= label.y0 < label.y1 <= maps.bbox.y1

    def test_a_model_that_was_not_trained(self) -> None:
        model = tiny("llama").model
        sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.5).embed(model)
        for figure in (heat_maps(changes_of(model)), shares_by_kind(changes_of(model))):
            figure.canvas.draw()


class Page(html.parser.HTMLParser):
    """Collects the tags and texts of a page, and checks that it closes what it opens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class TestPage:
    def test_it_holds_everything_and_needs_no_other_file(self, tmp_path: Path) -> None:
        changes = changes_of(trained("llama", 1)[0])
        path = tmp_path / "new" / "report.html"
        settings = {"method": "random", "sparsity": 0.5, "versions": {"torch": "<2>"}}
        write_report(path, changes, title="A & B", settings=settings, history=history_of(LOG))
        page = Page(path.read_text())
        assert not page.open
        sources = [attributes["src"] for tag, attributes in page.found if tag == "img"]
        assert len(sources) == 6
        assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
        assert not re.search(r"(?:href|src)=\"(?!data:)|url\(|@import", path.read_text())
        text = " ".join(page.texts)
        assert "A & B" in text and "torch <2>" in text and "3.000 → 2.000" in text
        assert all(each.name in text for each in changes)

    def test_without_a_history(self, tmp_path: Path) -> None:
        write_report(tmp_path / "report.html", changes_of(trained("llama", 0)[0]), history=History())
        assert "Over the steps" not in (tmp_path / "report.html").read_text()

    def test_an_older_page_stays_where_the_new_one_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="no weight"):
            write_report(tmp_path / "report.html", [])
        (tmp_path / "file").write_text("old")
        with pytest.raises(ReportError, match="No report can be written"):
            write_report(tmp_path / "file" / "report.html", changes_of(trained("llama", 0)[0]))
        assert (tmp_path / "file").read_text() == "old"
