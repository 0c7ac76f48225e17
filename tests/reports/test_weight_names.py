"""Weights are told apart by stack, layer and kind."""

import pytest
import torch
from tiny_models import tiny

import sylva_compile
from sylva_compile.reports import changes_of
from sylva_compile.reports.changes import by_kind
from sylva_compile.reports.weight_names import Place, places_of


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.7.up.weight", 3, "mlp.experts.up"),
        ("0.weight", 0, "weight"),
        ("pooler.dense.weight", None, "pooler.dense"),
    ],
)
def test_one_stack(name: str, number: int | None, kind: str) -> None:
    assert places_of([name]) == {name: Place("", number, kind)}


@pytest.mark.parametrize(
    ("names", "stacks"),
    [
        (["encoder.block.0.q.weight", "decoder.block.0.q.weight"], ["encoder", "decoder"]),
        (["model.vision.encoder.layers.0.q", "model.text.layers.0.q", "head.q"], ["vision.encoder", "text", ""]),
        (["layers.0.q", "vision.layers.0.q"], ["", "vision"]),
        (["layers.0.q", "layers.layers.0.q"], ["layers", "layers.layers"]),
        (["0.q", "layers.0.q"], ["", "layers"]),
    ],
)
def test_several_stacks(names: list[str], stacks: list[str]) -> None:
    found = places_of(names)
    assert [found[name].stack for name in names] == stacks
    assert len({(place.layer, place.kind) for place in found.values()}) == len(names)


def test_an_encoder_and_a_decoder_are_not_mixed() -> None:
    model = tiny("t5").model.requires_grad_(False)
    sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.5).embed(model)
    with torch.no_grad():
        kinds = by_kind(changes_of(model))
    for kind, changes in kinds.items():
        assert {each.name.split(".")[0] for each in changes} == {kind.split(".")[0]}
        assert len({each.layer_name for each in changes}) == len(changes)
