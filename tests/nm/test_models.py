"""Whole models with pruned weights: compiled and not, moved, copied, saved, with what trainings add around them."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_two_ranks import Net
from tiny_models import Case, checkpoint, tiny
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

import sylva_compile
from sylva_compile import NMMasks
from sylva_compile.errors import EmbedError, MaskError, ScopeError
from sylva_compile.schedules import MaskChange


class Counting:
    """A backend that counts the graphs that it compiles."""

    def __init__(self, masks: NMMasks) -> None:
        self.backend, self.graphs = sylva_compile.backend(masks, inner="aot_eager"), 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return self.backend(gm, example_inputs)


def pruned(
    architecture: str = "llama", dtype: torch.dtype = torch.float64, layers: int = 1, **options: Any
) -> tuple[Case, NMMasks]:
    torch.manual_seed(0)
    case = tiny(architecture, layers=layers)
    case.model.to(dtype)
    masks = sylva_compile.prune_masks(case.model, **options)
    masks.embed()
    return case, masks


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta", "opt", "qwen2"])
def test_architectures_train_as_their_dense_model_without_double_pruning(architecture: str) -> None:
    case, masks = pruned(architecture, double=False)
    dense = tiny(architecture, layers=1).model.double()
    dense.load_state_dict(case.model.state_dict())
    found, wanted = gradients(case.model, case.batch), gradients(dense, case.batch)
    for name, module in masks.modules().items():
        wanted[name + "_values"] = module._nm_layout.read(wanted.pop(name))
    assert_same(found, wanted)


class Small(nn.Module):
    """A model with a loss, in one frame."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), Conv1D(8, 24)

    def forward(self, x: Tensor) -> Any:
        return CausalLMOutput(loss=self.two(self.one(x).relu()).square().mean())


def small() -> tuple[Case, NMMasks]:
    torch.manual_seed(0)
    case = Case(Small().double(), {"x": torch.randn(2, 5, 16, dtype=torch.float64)})  # type: ignore[arg-type]
    masks = sylva_compile.prune_masks(case.model)
    masks.embed()
    return case, masks


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_graphs_stay_over_mask_changes_and_adapters_cost_one_more(how: str) -> None:
    case, masks = small() if how == "whole" else pruned(layers=2)
    eager = copy.deepcopy(case.model)
    theirs = NMMasks(masks, model=eager)
    counting = Counting(masks)
    if how == "whole":
        case.model.compile(backend=counting)
    else:
        sylva_compile.compile_layers(case.model, counting)
    one, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (case.model, eager))
    graphs = []
    for step in range(6):
        if step == 4:
            for model, optimizer in ((case.model, one), (eager, other)):
                added = sylva_compile.add_low_rank(model, 4, generator=torch.Generator().manual_seed(1))
                optimizer.add_param_group({"params": added})
        found, wanted = gradients(case.model, case.batch), gradients(eager, case.batch)
        assert_same(found, wanted)
        one.step(), other.step()
        masks.change_masks(), theirs.change_masks()
        graphs.append(counting.graphs)
    first = graphs[0]
    assert graphs[:4] == [first] * 4
    assert first < graphs[4] == graphs[5] <= 2 * first
    assert_same(case.model.state_dict(), eager.state_dict())


def test_inductor_and_float32_agree() -> None:
    model = Net()
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    eager = copy.deepcopy(model)

    def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.compile(backend=sylva_compile.backend(masks))
    # The second length makes sizes dynamic.
    for x in (torch.randn(2, 5, 16), torch.randn(3, 4, 16)):
        assert_same(gradients_of(model, x), gradients_of(eager, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_round_and_nothing_more(dtype: torch.dtype) -> None:
    found = {}
    torch.manual_seed(1)
    start = Net().to(dtype)
    x, gy = torch.randn(6, 16).to(dtype), torch.randn(6, 8).to(dtype)
    for wide in (False, True):
        model = copy.deepcopy(start).to(torch.float64 if wide else dtype)
        masks = sylva_compile.prune_masks(model)
        masks.embed()
        kind = torch.float64 if wide else dtype
        inputs = x.to(kind, copy=True).requires_grad_()
        out = model(inputs)
        out.backward(gy.to(kind))
        assert inputs.grad is not None and out.dtype == inputs.grad.dtype == kind
        found[wide] = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        found[wide] |= {"out": out.detach().double(), "x": inputs.grad.double()}
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-2}
    assert_same(found[False], found[True], **rounding)


class Broken(nn.Module):
    """A layer with graph breaks on both sides of its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).relu()
        torch._dynamo.graph_break()
        x = self.outer(x)
        torch._dynamo.graph_break()
        return x.sum()


def test_a_graph_break_changes_nothing() -> None:
    model = Broken().double()
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    model(x).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    # The second mask matters here: the exact input gradient is another one.
    exact = copy.deepcopy(model)
    for module in exact.children():
        module._nm_layout.double = False  # type: ignore[union-attr]
    x.grad = None
    exact(x).backward()
    assert x.grad is not None and wanted["x"] is not None
    assert (x.grad - wanted["x"]).abs().max() > 0.1 * wanted["x"].abs().max()
    x.grad = None
    model.zero_grad()
    counting = Counting(masks)
    model.compile(backend=counting)
    model(x).backward()
    assert counting.graphs > 1
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(found | {"x": x.grad}, wanted)  # type: ignore[dict-item]


@pytest.mark.parametrize("compiled", [False, True])
def test_an_edit_by_hand_reaches_both_passes(compiled: bool) -> None:
    case, masks = small()
    if compiled:
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
    gradients(case.model, case.batch)
    for values in masks.parameters():
        with torch.no_grad():
            values.mul_(1.5)
        values.data.add_(0.01)
    # A copy made from the dense weights has nothing that could be stale.
    fresh = Small().double()
    fresh.load_state_dict(case.model.state_dict())
    others = NMMasks(masks, config=masks.config)
    others.embed(fresh)
    others.load_state_dict(masks.state_dict())
    assert_same(gradients(case.model, case.batch), gradients(fresh, case.batch))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_change_between_forward_and_backward_is_refused(compiled: bool) -> None:
    model = Net()
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    if compiled:
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
    loss = model(torch.randn(3, 16)).sum()
    masks.change_masks()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_freezing_makes_no_constants_of_values() -> None:
    model, x = Net(), torch.randn(3, 16)
    masks = sylva_compile.prune_masks(model)
    compiled = torch.compile(model, backend=sylva_compile.backend(masks))
    # Autocast's rounded copies of the values would be such constants.
    with inductor_config.patch(freezing=True), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
            masks.parameters()[0].mul_(2.0)


def test_a_state_dict_is_copied_even_if_it_is_to_be_assigned() -> None:
    model = Shared()
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    state = {name: value * 2 for name, value in model.state_dict().items()}
    before = masks.parameters()[0]
    model.load_state_dict(state, assign=True)
    assert model.one.weight_values is model.two.weight_values is before
    assert_same(dict(model.state_dict()), state)


def test_the_dense_weight_cannot_be_read_or_replaced() -> None:
    case, masks = pruned()
    name = next(iter(masks))
    module = case.model.get_submodule(name.removesuffix(".weight"))
    for act in (lambda: module.weight, lambda: setattr(module, "weight", nn.Parameter(torch.zeros(2)))):
        with pytest.raises(EmbedError, match=f"{name} is pruned 2:4 and has no dense weight"):
            act()


def test_state_dicts_are_those_of_the_dense_model(tmp_path: Path) -> None:
    case, masks = pruned(dtype=torch.float32)
    dense = tiny("llama", layers=1).model
    assert list(case.model.state_dict()) == list(dense.state_dict())
    torch.optim.AdamW(masks.parameters(), lr=0.1).step()
    gradients(case.model, case.batch)
    torch.optim.SGD(case.model.parameters(), lr=0.1).step()
    case.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(case.model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**case.batch).loss, case.model(**case.batch).loss)
    for name, mask in masks.items():
        assert not loaded.get_parameter(name)[~mask.dense()].any()
    again, _ = pruned(dtype=torch.float32)
    again.model.load_state_dict(loaded.state_dict())
    assert_same(dict(again.model.state_dict()), dict(case.model.state_dict()))


def test_a_dense_state_dict_is_refused_before_anything_changes() -> None:
    case, masks = pruned(dtype=torch.float32)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    name = next(iter(masks))
    with pytest.raises(RuntimeError, match="not zero outside of its mask"):
        case.model.load_state_dict({name: torch.ones(masks[name].shape)}, strict=False)
    assert_same(dict(case.model.state_dict()), before)
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        case.model.load_state_dict({key: value for key, value in before.items() if key != name})


def test_masks_are_saved_and_bound_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, masks = pruned()
    masks.save(tmp_path / "masks.safetensors")
    dense = tiny("llama", layers=1).model.double()
    dense.load_state_dict(case.model.state_dict())
    NMMasks.load(tmp_path / "masks.safetensors").embed(dense)
    assert not caplog.records
    NMMasks.load(tmp_path / "masks.safetensors").embed(tiny("llama", layers=1).model.double())
    assert "would not keep their largest values" in caplog.text
    loaded = NMMasks.load(tmp_path / "masks.safetensors")
    assert loaded.config["m"] == 4 and loaded.double and loaded.model is None
    assert all(loaded[name].same_as(mask) for name, mask in masks.items())
    loaded.embed(case.model)
    with pytest.raises(EmbedError, match="pruned by other masks"):
        NMMasks(masks, double=False).embed(case.model)
    with pytest.raises(MaskError, match="this model lacks"):
        loaded.embed(tiny("gpt2").model)
    with pytest.raises(MaskError, match="not bound"):
        pickle.loads(pickle.dumps(masks)).parameters()
    (tmp_path / "other").write_bytes(b"nothing")
    for path in ("other", "none"):
        with pytest.raises(MaskError, match=path):
            NMMasks.load(tmp_path / path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [None, 3])
def test_a_resumed_training_is_the_undisturbed_one(dtype: torch.dtype, ranks: int | None) -> None:
    def made(seed: int) -> tuple[Case, MaskChange, Any]:
        case, masks = pruned(dtype=dtype)
        if ranks is not None:
            # Another L, at other places.
            sylva_compile.add_low_rank(case.model, ranks, generator=torch.Generator().manual_seed(seed))
        return case, MaskChange(masks, every=2), torch.optim.AdamW(case.model.parameters(), lr=0.01)

    def train(case: Case, schedule: MaskChange, optimizer: Any) -> None:
        for _ in range(3):
            gradients(case.model, case.batch)
            optimizer.step()
            schedule.step()

    once = made(0)
    train(*once)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (once[0].model, *once[1:])], file)
    train(*once)
    torch.manual_seed(3)
    again = made(1)
    file.seek(0)
    for each, state in zip((again[0].model, *again[1:]), torch.load(file), strict=True):
        each.load_state_dict(state)
    train(*again)
    for one, other in zip(once[0].model.parameters(), again[0].model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_same(dict(again[0].model.state_dict()), dict(once[0].model.state_dict()), rtol=0, atol=0)
    assert once[1].steps == again[1].steps == 6


def test_copies_and_pickles_are_models_of_their_own() -> None:
    case, masks = pruned()
    sylva_compile.add_low_rank(case.model, 2)
    wanted = gradients(case.model, case.batch)
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert_same(gradients(twin, case.batch), wanted)
        NMMasks(masks).embed(twin)
        with torch.no_grad():
            NMMasks(masks, model=twin).parameters()[0].zero_()
    assert_same(gradients(case.model, case.batch), wanted)


def test_values_stay_wide_when_the_model_is_narrowed() -> None:
    case, masks = pruned(dtype=torch.float32)
    sylva_compile.add_low_rank(case.model, 2)
    before = [values.detach().clone() for values in masks.parameters()]
    case.model.bfloat16()
    for values, old in zip(masks.parameters(), before, strict=True):
        assert values.dtype == torch.float32 and torch.equal(values, old)
    assert case.model.state_dict()[next(iter(masks))].dtype == torch.bfloat16
    assert case.model(**case.batch).logits.dtype == torch.bfloat16
    case.model.double()
    assert {values.dtype for values in masks.parameters()} == {torch.float64}
    case.model(**case.batch).loss.backward()
    with pytest.raises(EmbedError, match=r"computes in torch\.float64 and is given torch\.float32"):
        case.model.get_submodule("model.layers.0.mlp.up_proj")(torch.ones(1, 32))


def test_trainings_around_it_work() -> None:
    case, masks = pruned(dtype=torch.float32)
    wanted = gradients(case.model, case.batch)
    half = {name: value[:2] for name, value in case.batch.items()}, {n: v[2:] for n, v in case.batch.items()}
    case.model.zero_grad()
    for part in half:
        (case.model(**part).loss / 2).backward()
    accumulated = {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}
    assert_same(accumulated, wanted, rtol=1e-4, atol=1e-6)
    checkpoint(case.model)
    assert_same(gradients(case.model, case.batch), wanted)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.0)
    case.model.zero_grad()
    scaler.scale(case.model(**case.batch).loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(case.model.parameters(), 1e9)
    assert float(norm) == pytest.approx(float(torch.stack([g.norm() for g in wanted.values()]).norm()), rel=1e-4)
    scaler.step(optimizer)
    assert all(values.grad is not None for values in masks.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_computes_as_the_dense_model_does(compiled: bool) -> None:
    model = Net()
    dense = copy.deepcopy(model)
    masks = sylva_compile.prune_masks(model, double=False)
    masks.embed()
    dense.load_state_dict(model.state_dict())
    if compiled:
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = model(x), dense(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward(), wanted.float().square().sum().backward()
    for name, values in zip(masks, masks.parameters(), strict=True):
        gradient = dense.get_parameter(name).grad
        assert gradient is not None and values.grad is not None and values.dtype == torch.float32
        layout = masks.modules()[name]._nm_layout
        torch.testing.assert_close(values.grad, layout.read(gradient), rtol=2e-2, atol=5e-2)


def test_merging_makes_an_ordinary_model() -> None:
    case, _ = pruned("gpt2")
    sylva_compile.add_low_rank(case.model, 2)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    for _ in range(2):
        gradients(case.model, case.batch)
        optimizer.step()
    with torch.no_grad():
        wanted = case.model(**case.batch).logits
    exported = sylva_compile.export_pruned(case.model)
    sylva_compile.merge_and_unload(case.model)
    dense = tiny("gpt2", layers=1).model.double()
    assert list(exported) == list(dense.state_dict()) == list(case.model.state_dict())
    dense.load_state_dict(exported)
    for model in (dense, case.model):
        with torch.no_grad():
            torch.testing.assert_close(model(**case.batch).logits, wanted)
    assert type(case.model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.words = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_summary_and_report_name_the_kernels() -> None:
    case, masks = pruned("gpt2", dtype=torch.float32)
    assert masks.model is case.model
    backend = sylva_compile.backend(masks)
    before = backend.report()
    assert str(before).endswith("not run, input gradient not run\n4 weights are pruned.") and not before
    name = next(iter(before.others))
    case.model(**case.batch).loss.backward()
    assert before.others[name] == "2:4, forward not run, input gradient not run"
    tokens = case.batch["input_ids"].numel()
    ran = f"2:4, forward sparse at {tokens} tokens, input gradient sparse at {tokens} tokens"
    assert backend.report().others == dict.fromkeys(before.others, ran)
    first, line, *_, last = masks.summary(4).splitlines()
    assert first.endswith("kernels at 4 tokens") and line.endswith(("sparse and sparse", "dense and dense"))
    assert last == "4 weights, 6,144 of 12,288 elements kept (50.0%)."
    model = tiny("gpt2", layers=1).model
    exact = sylva_compile.prune_masks(model, double=False)
    assert "kernels" not in exact.summary()
    exact.embed()
    assert exact.summary(4).splitlines()[1].endswith(" and dense")


def test_a_shared_weight_has_one_set_of_values() -> None:
    model = Shared().double()
    masks = sylva_compile.prune_masks(model)
    assert list(masks) == ["one.weight"]
    masks.embed()
    sylva_compile.add_low_rank(model, 2)
    assert model.one.weight_values is model.two.weight_values
    x = torch.randn(3, 8, dtype=torch.float64)
    model(x).sum().backward()
    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    state = {key: value for key, value in model.state_dict().items() if "left" not in key and "right" not in key}
    dense.load_state_dict({k.replace("one", "0").replace("two", "1"): v for k, v in state.items() if "words" not in k})
    torch.testing.assert_close(dense(x), model(x))
    sylva_compile.fold_low_rank(model)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x))
    sylva_compile.unprune(model)
    assert model.one.weight is model.two.weight and type(model.one) is nn.Linear
    torch.testing.assert_close(dense(x), model(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


@pytest.mark.parametrize("copied", [False, True])
def test_weights_of_one_name_are_told_apart(copied: bool) -> None:
    model = Pair().double()
    masks = [sylva_compile.prune_masks(model.a)]
    masks[0].embed()
    if copied:
        model.b = copy.deepcopy(model.a)
        with torch.no_grad():
            model.b.get_parameter("0.weight_values").mul_(2)
    else:
        masks.append(sylva_compile.prune_masks(model.b))
        masks[1].embed()
    for each in masks:
        each.change_masks()
    sylva_compile.export_pruned(model)
    added = sylva_compile.add_low_rank(model, 2)
    assert len(added) == 4
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.5 * (parameter == 0))
    x = torch.randn(3, 8, dtype=torch.float64)
    wanted = model(x).detach()
    dense = Pair().double()
    dense.load_state_dict(sylva_compile.export_pruned(model))
    torch.testing.assert_close(dense(x), wanted)
    sylva_compile.unprune(model)
    assert type(model.a[0]) is type(model.b[0]) is nn.Linear
    torch.testing.assert_close(model(x), wanted)


def test_the_second_mask_is_that_of_loaded_values() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    model.load_state_dict(model.state_dict() | {"0.weight": torch.randn(64, 64) * masks["0.weight"].dense()})
    found = masks.state_dict()["0.weight"]
    masks.change_masks()
    assert_same(found, masks.state_dict()["0.weight"])


def test_frozen_weights_stay_frozen() -> None:
    model = Pair()
    model.a.requires_grad_(False)
    sylva_compile.prune_masks(model).embed()
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["b.0.bias", "b.0.weight_values"]
    sylva_compile.unprune(model)
    assert not model.a[0].weight.requires_grad


def test_folded_layers_hold_what_inference_reads() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    masks = sylva_compile.prune_masks(model)
    masks.embed()
    layout, mask = masks.modules()["0.weight"]._nm_layout, masks["0.weight"]
    assert layout.codes.data_ptr() == mask.codes.data_ptr()
    sylva_compile.add_low_rank(model, 2)
    sylva_compile.fold_low_rank(model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = model(x)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        layout, low_rank = each[0]._nm_layout, each[0]._nm_low_rank
        with torch.no_grad():
            torch.testing.assert_close(each(x.to(layout.dtype)).float(), wanted)
        assert layout.second.numel() == 0
        assert layout.codes.data_ptr() == low_rank.folded.data_ptr()
        assert low_rank.codes.data_ptr() == low_rank.folded[32:].data_ptr()
    masks.change_masks()
    assert masks.summary(4).splitlines()[1].endswith("and none")
    sylva_compile.unprune(model)
    torch.testing.assert_close(model(x.double()).float(), wanted)


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_weights_that_cannot_be_pruned_are_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    tied = Shared()
    tied.words.weight = tied.one.weight
    with pytest.raises(ScopeError, match=r"one\.weight is the weight of a Embedding"):
        sylva_compile.prune_masks(tied)
    with pytest.raises(ScopeError, match=r"0\.weight is the weight of a Odd"):
        sylva_compile.prune_masks(nn.Sequential(Odd(8, 8)))
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8))
    with pytest.raises(ScopeError, match=r"0\.weight is \(6, 8\), and m=4 does not divide it"):
        sylva_compile.prune_masks(model, scope=["0", "2"])
    assert list(sylva_compile.prune_masks(model)) == ["2.weight"]
    assert "2 weights stay dense, since m=4 does not divide their sizes: 0.weight, 1.weight" in caplog.text
    assert list(sylva_compile.prune_masks(model, double=False)) == ["0.weight", "2.weight"]
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].forward = hooked[0].forward  # as accelerate does to dispatch modules
    with pytest.raises(ScopeError, match=r"0\.weight is the weight of a Linear, which computes otherwise"):
        sylva_compile.prune_masks(hooked)
    blocks = nn.Sequential(nn.Linear(8, 8))
    sylva_compile.Masks.from_block_maps(blocks, {"0.weight": torch.ones(1, 1, dtype=torch.bool)}, 8).embed()
    with pytest.raises(EmbedError, match=r"0\.weight carries blocks"):
        sylva_compile.prune_masks(blocks)


@pytest.mark.parametrize("width", [12, 20])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    sylva_compile.prune_masks(model).embed()
    with pytest.raises(RuntimeError, match=r"0\.weight takes 16 inputs and is given x of \(3, "):
        model(torch.randn(3, width))


def test_an_optimizer_from_before_is_refused() -> None:
    case = tiny("llama")
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    masks = sylva_compile.prune_masks(case.model)
    masks.embed()
    case.model(**case.batch).loss.backward()
    with pytest.raises(EmbedError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.weight from before"):
        optimizer.step()
    pruned_one = torch.optim.SGD(case.model.parameters(), lr=0.1)
    pruned_one.step()
    sylva_compile.unprune(case.model)
    with pytest.raises(EmbedError, match="made dense again"):
        pruned_one.step()


def test_semi_structured_weights_are_refused_where_torch_has_none() -> None:
    case, _ = pruned(dtype=torch.float32)
    with pytest.raises(EmbedError, match="export form='dense'"):
        sylva_compile.export_pruned(case.model, "semi-structured")
    with pytest.raises(EmbedError, match="no pruned weights"):
        sylva_compile.export_pruned(tiny("llama").model)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_frozen_model_computes_the_same_without_what_training_needs(rank: int) -> None:
    case, masks = pruned(dtype=torch.bfloat16)
    if rank:
        sylva_compile.add_low_rank(case.model, rank)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    case.model(**case.batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = case.model(**case.batch).logits
        masks.freeze()
        masks.freeze()
        assert torch.equal(case.model(**case.batch).logits, before)
    name, module = next(iter(masks.modules().items()))
    layout = module._nm_layout
    assert layout.second.numel() == 0
    assert {parameter.dtype for parameter in masks.parameters()} == {torch.bfloat16}
    with pytest.raises(EmbedError, match=f"{name} is frozen for inference; run it under torch.no_grad"):
        case.model(**case.batch)
    with pytest.raises(EmbedError, match="The optimizer holds"):
        optimizer.step()
    dense = tiny("llama", layers=1).model.to(torch.bfloat16)
    dense.load_state_dict(sylva_compile.export_pruned(case.model))
    with torch.no_grad():
        wide = copy.deepcopy(case.model).double()
        wanted = dense.double()(**case.batch).logits
        torch.testing.assert_close(wide(**case.batch).logits, wanted, rtol=2e-2, atol=2e-2)
