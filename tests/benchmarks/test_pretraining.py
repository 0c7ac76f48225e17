"""The pre-trainings of `benchmarks.pretraining`, in sizes that take seconds."""

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sylva_compile
from benchmarks.pretraining import run, table
from benchmarks.pretraining.training import METHODS, Method, Sizes, Text, groups_of, new_model, pretrain
from benchmarks.quality.rows import Rows
from benchmarks.quality.tasks.small_gpt2 import Recipe

SIZES = Sizes(Recipe(layers=1, heads=2, width=16, batch=4), steps=20, length=16, held_out=8, change=5, evaluate=10)


@pytest.fixture(scope="module")
def text() -> Text:
    # A sequence counts upwards, so that there is something to learn.
    sequences = (torch.arange(16) + torch.arange(80)[:, None]) % 32
    return Text(sequences[:64], sequences[64:72], sequences[72:], 32)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_learn(text: Text, name: str) -> None:
    before = new_model(text, SIZES, 0)(input_ids=text.test, labels=text.test).loss.item()
    method = METHODS[name]
    if method.adapters:
        method = replace(method, adapters=0.5, rank=4)
    found = pretrain(text, SIZES, method, 1e-2, 0, lambda line: None)
    assert [at for at, _ in found["curve"]] == [10, 20]
    assert found["test"] < before - 0.1
    if method.adapters:
        assert found["test, folded"] == pytest.approx(found["test"], abs=1e-5)


def test_a_run_is_the_same_again(text: Text) -> None:
    one, other = (pretrain(text, SIZES, METHODS["SLoPe 2:4"], 1e-2, 1, lambda line: None) for _ in range(2))
    assert one["curve"] == other["curve"] and one["test"] == other["test"]


def test_adapters_go_on_from_the_state_that_slope_left(text: Text, tmp_path: Path) -> None:
    said: list[str] = []
    late = {"sooner": Method(2, 4, adapters=0.1, rank=4), "later": Method(2, 4, adapters=0.05, rank=4)}
    sizes = replace(SIZES, steps=100, change=7)
    wanted = {name: pretrain(text, sizes, each, 1e-2, 1, said.append) for name, each in late.items()}
    alone = pretrain(text, sizes, METHODS["SLoPe 2:4"], 1e-2, 1, said.append, tmp_path)
    assert len(list(tmp_path.glob("*/90.pt"))) == len(list(tmp_path.glob("*/99.pt"))) == 1
    assert not any(line.startswith("on from") for line in said)
    said.clear()
    for name, each in late.items():
        found = pretrain(text, sizes, each, 1e-2, 1, said.append, tmp_path)
        del found["seconds"], wanted[name]["seconds"]
        assert found == wanted[name]
    assert [line for line in said if line.startswith("on from")] == ["on from step 90"] * 2
    assert alone["test"] != wanted["sooner"]["test"]
    # Neither another seed or rate nor a model without second masks goes on from these.
    said.clear()
    pretrain(text, sizes, late["sooner"], 1e-2, 2, said.append, tmp_path)
    pretrain(text, sizes, late["sooner"], 2e-2, 1, said.append, tmp_path)
    pretrain(text, sizes, replace(late["sooner"], double=False), 1e-2, 1, said.append, tmp_path)
    assert not any(line.startswith("on from") for line in said)


def test_embeddings_have_a_rate_of_their_own(text: Text) -> None:
    model = new_model(text, SIZES, 0)
    sylva_compile.prune_masks(model, 2, 4).embed()
    weights, others = groups_of(model, 1e-3, 4e-3)
    assert (weights["peak"], others["peak"]) == (1e-3, 4e-3)
    names = {id(each): name for name, each in model.named_parameters()}
    assert all(names.pop(id(each)).endswith("weight_values") for each in weights["params"])
    assert {id(each) for each in others["params"]} == set(names)
    assert groups_of(model, 1e-3, None)[1]["peak"] == 1e-3
    # They change the loss, and the keys of rows from before they existed stay.
    of_old, of_new = SIZES, replace(SIZES, others=1e-2)
    old, new = (pretrain(text, sizes, Method(), 1e-3, 0, lambda line: None)["test"] for sizes in (of_old, of_new))
    assert new < old
    assert "others" not in run.key_of("dense", 1e-3, 0, of_old)["sizes"]
    assert run.key_of("dense", 1e-3, 0, of_new)["sizes"]["others"] == 1e-2


def row(method: str, rate: float, seed: int, loss: float, adapter_rate: float | None = None) -> dict[str, Any]:
    result = {"curve": [[50, loss + 1], [100, loss]], "validation": loss, "test": loss}
    return {"run": run.key_of(method, rate, seed, SIZES, adapter_rate), "result": result}


def test_rates_walk_until_the_best_has_tried_neighbours(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    tried = []
    for rate, seed, _ in run.runs_to_do(rows, "dense", SIZES):
        tried.append((rate, seed))
        rows.append(**row("dense", rate, seed, abs(rate - 5e-4)))
    assert tried == [(1e-3, 0), (5e-4, 0), (2.5e-4, 0), (5e-4, 1), (5e-4, 2)]
    with pytest.raises(ValueError, match="train that first"):
        list(run.runs_to_do(rows, "SLoPe 2:4, adapters in the last 1%", SIZES))
    for rate, *_ in run.runs_to_do(rows, "SLoPe 2:4", SIZES, 1):
        rows.append(**row("SLoPe 2:4", rate, 0, abs(rate - 2e-3)))
    assert list(run.losses_of(rows.read(), "SLoPe 2:4", 0, SIZES)) == [4e-3, 2e-3, 1e-3]
    late = "SLoPe 2:4, adapters in the last 1%"
    # A row of before they had a rate of their own counts as one of the weights' rate.
    rows.append(**row(late, 2e-3, 0, 0.002))
    tried = []
    for rate, seed, of_adapters in run.runs_to_do(rows, late, SIZES):
        tried.append((rate, seed, of_adapters))
        rows.append(**row(late, rate, seed, abs(of_adapters - 5e-4), of_adapters))
    assert tried == [(2e-3, 0, rate) for rate in (1e-3, 5e-4, 2.5e-4)] + [(2e-3, 1, 5e-4), (2e-3, 2, 5e-4)]
    [first, *others] = table.chosen(rows.read(), late, SIZES)
    assert (first["run"]["adapter_rate"], first["result"]["test"], len(others)) == (5e-4, 0.0, 2)
    assert "| 0.002, 0.0005 | 0.000 ± 0.000 |" in table.table_of({late: [first, *others]})
    with pytest.raises(ValueError, match="takes the learning rate of SLoPe 1:4"):
        list(run.runs_to_do(rows, "SLoPe 1:4, adapters in the last 1%", SIZES))
    # A training that diverged is never the best.
    assert run.best_rate({1e-3: float("nan"), 2e-3: 3.0}) == 2e-3


def test_the_table_has_the_share_of_the_gap() -> None:
    late = "SLoPe 2:4, adapters in the last 1%"
    rows = {
        str(at): row(method, 1e-3, seed, loss)
        for at, (method, seed, loss) in enumerate(
            [("dense", 0, 2.0), ("dense", 1, 2.2), ("SLoPe 2:4", 0, 3.0), ("SLoPe 2:4", 1, 3.2), (late, 0, 2.5)]
        )
    }
    lines = {method: table.chosen(rows, method, SIZES) for method in METHODS}
    text = table.table_of(lines)
    assert "| dense | 0.001 | 2.100 ± 0.141 |  |  |  | 2 |" in text
    assert "| SLoPe 2:4 | 0.001 | 3.100 ± 0.141 |  | 1.000 ± 0.000 |  | 2 |" in text
    assert f"| {late} | 0.001 | 2.500 |  | 0.500 | 50% | 1 |" in text
    assert len(table.curves_of(lines).axes[0].lines) == 3
    # No share of a gap that is within the spread.
    wavering = {"dense": [2.0, 3.2], "SLoPe 2:4": [3.0, 3.0], late: [2.5, 2.9]}
    lines = {
        method: [row(method, 1e-3, seed, loss) for seed, loss in enumerate(losses)]
        for method, losses in wavering.items()
    }
    assert "%" not in table.table_of(lines).replace("1%", "")


def test_single_seeds_can_come_first(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    for rate in (5e-4, 1e-3, 2e-3):
        rows.append(**row("dense", rate, 0, abs(rate - 1e-3)))
    assert list(run.runs_to_do(rows, "dense", SIZES, 1)) == []
    assert list(run.runs_to_do(rows, "dense", SIZES)) == [(1e-3, 1, None), (1e-3, 2, None)]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "600-steps"),
        (["--others", "8e-3"], "600-steps-others-0.008"),
        (["--width", "48", "--steps", "50", "--others", "0"], "50-steps-width-48-one-rate"),
    ],
)
def test_tables_have_a_file_for_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], name: str
) -> None:
    parser = ArgumentParser()
    run.add_sizes(parser)
    sizes = run.sizes_of(parser.parse_args(options))
    late = "SLoPe 2:4, adapters in the last 10%"
    key = run.key_of(late, 1e-3, 0, sizes)
    assert key["rank"] == sizes.recipe.width // 12
    rows = Rows(tmp_path / "rows.jsonl")
    rows.append(run.key_of("dense", 1e-3, 0, sizes), result={"curve": [[1, 3.0]], "validation": 3.0, "test": 3.0})
    monkeypatch.setattr(table, "PATH", rows.path)
    table.main(options)
    assert "| dense | 0.001 | 3.000 |" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").exists()
