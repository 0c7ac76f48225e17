"""Several adapters on one base: each comes back bit for bit, in place where that is possible."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_invariant, block_gradients, blocks_by_loops
from safetensors.torch import load_file
from tiny_models import tiny
from torch import nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import AdapterError, EmbedError, SylvaError

FIRST, SECOND, HEAD = "body.0.weight", "body.2.weight", "head.weight"


class Net(nn.Module):
    """No width is a multiple of a block size, so blocks reach over every edge."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))
        self.head = nn.Linear(30, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits


def choose(model: nn.Module, counts: dict[str, int], block_size: int) -> Masks:
    """Choose so many blocks of each weight at random."""
    maps = {}
    for name, count in counts.items():
        m, n = model.get_parameter(name).shape
        grid = (-(-m // block_size), -(-n // block_size))
        maps[name] = (torch.randperm(grid[0] * grid[1]) < count).view(grid)
    return Masks.from_block_maps(model, maps, block_size)


def train(model: Any, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or sylva_compile.AdamW(masks.parameters(), lr=0.02)
    for _ in range(2):
        model(torch.randn(6, 40, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(
    base: nn.Module, directory: Path, counts: dict[str, int], block_size: int = 8, *, moves: int = 0, head: bool = False
) -> nn.Module:
    """Train an adapter of `base`, save it, and return the trained model."""
    model = copy.deepcopy(base)
    masks = choose(model, counts, block_size)
    train(model, masks)
    for _ in range(moves):
        masks.move(dict(choose(model, counts, block_size)))
        train(model, masks)
    if head:
        with torch.no_grad():
            model.head.bias.add_(1)
    sylva_compile.save_adapter(model, directory, modules_to_save=["head"] if head else [])
    return model


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy everything: dense weights and blocks."""
    found = {name: value.clone() for name, value in model.state_dict().items()}
    return found | {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def frozen(dtype: torch.dtype = torch.float32) -> Net:
    return Net().to(dtype).requires_grad_(False)


KINDS: list[dict[str, Any]] = [
    {"counts": {FIRST: 9, SECOND: 5}},
    {"counts": {FIRST: 9, SECOND: 5}, "moves": 2},
    {"counts": {FIRST: 3, SECOND: 2}, "block_size": 16},
    {"counts": {SECOND: 5, HEAD: 4}},
    {"counts": {FIRST: 9}, "head": True},
]


@settings(max_examples=10, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    trained_here=st.booleans(),
)
def test_every_adapter_comes_back_bit_for_bit(
    kinds: list[dict[str, Any]],
    dtype: torch.dtype,
    order: list[int],
    trained_here: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("adapters")
    base = frozen(dtype)
    alone = {str(k): values(make(base, directory / str(k), **kind)) for k, kind in enumerate(kinds)}
    model = copy.deepcopy(base)
    if trained_here:
        masks = choose(model, {FIRST: 9, SECOND: 5}, 8)
        train(model, masks)
        alone = {"default": values(model), **alone}
    for k in range(len(kinds)):
        sylva_compile.load_adapter(model, directory / str(k), str(k))
    names = list(alone)
    assert sylva_compile.list_adapters(model) == names
    assert sylva_compile.active_adapter(model) == names[0]
    assert same(values(model), alone[names[0]])
    for number in [*order, 1, 0]:
        name = names[number % len(names)]
        masks = sylva_compile.set_adapter(model, name)
        assert sylva_compile.active_adapter(model) == name
        assert same(values(model), alone[name])
        assert {name: state.mask for name, state in block_states(model).items()} == dict(masks)
        with sylva_compile.disable_adapter(model):
            assert same(dict(model.state_dict()), dict(base.state_dict()))
    sylva_compile.unload_adapter(model)
    assert same(values(model), values(base))
    assert sylva_compile.list_adapters(model) == []
    assert sylva_compile.active_adapter(model) is None


def test_what_was_trained_meanwhile_is_kept(tmp_path: Path) -> None:
    base = frozen(torch.bfloat16)
    for name in "ab":
        make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
    masks = {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "ab"}
    then = {}
    for name in "abab":
        sylva_compile.set_adapter(base, name)
        assert name not in then or same(values(base), then[name])
        masks[name].move(dict(choose(base, {FIRST: 9, SECOND: 5}, 8)))
        train(base, masks[name])
        assert_invariant(base, masks[name])
        then[name] = values(base)


def test_the_active_adapter_is_saved_and_nothing_of_the_others(tmp_path: Path) -> None:
    base = frozen()
    for name in "ab":
        make(base, tmp_path / name, {FIRST: 9, SECOND: 5}, moves=1)
    for name in "ab":
        sylva_compile.load_adapter(base, tmp_path / name, name)
    for name in "bab":
        sylva_compile.set_adapter(base, name)
        sylva_compile.save_adapter(base, tmp_path / "again")
        (ours,) = (tmp_path / "again").glob("*.safetensors")
        (theirs,) = (tmp_path / name).glob("*.safetensors")
        assert same(load_file(ours), load_file(theirs))


def test_changed_values_are_those_of_the_active_adapter(tmp_path: Path) -> None:
    base = frozen()
    for name in "ab":
        make(base, tmp_path / name, {FIRST: 9, SECOND: 5}, moves=1)
    for name in "ab":
        sylva_compile.load_adapter(base, tmp_path / name, name)
    alone = copy.deepcopy(base)
    expected = [(name, *map(torch.clone, pair)) for name, *pair in sylva_compile.changed_values(alone)]
    for name in "ba":
        sylva_compile.set_adapter(base, name)
    for ours, theirs in zip(sylva_compile.changed_values(base), expected, strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
        assert torch.equal(ours[2], theirs[2])


def counting(masks: Masks) -> tuple[Any, list[int]]:
    """Return a backend, and a list that gets an entry for each graph."""
    backend, compiled = sylva_compile.backend(masks, inner="aot_eager", on_miss="error"), []

    def counted(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        compiled.append(1)
        return backend(gm, inputs, **kwargs)

    return counted, compiled


class TestCompiled:
    def check(self, run: Any, model: nn.Module, masks: Masks) -> None:
        """Compare a training pass of `run` with the dense gradients of an ordinary model."""
        plain = Net()
        plain.load_state_dict(model.state_dict())
        x = torch.randn(6, 40)
        output, expected = run(x), plain(x)
        torch.testing.assert_close(output, expected)
        output.square().mean().backward()
        expected.square().mean().backward()
        for name, gradient in block_gradients(model, masks).items():
            dense = plain.get_parameter(name).grad
            assert dense is not None and dense.any()
            torch.testing.assert_close(gradient, blocks_by_loops(dense, masks[name]))
            model.get_parameter(name + "_blocks").grad = None

    def test_nothing_is_compiled_again_where_the_numbers_of_blocks_agree(self, tmp_path: Path) -> None:
        base = frozen()
        for name in "abc":
            make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
        masks = {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "abc"}
        assert len({len(set(masks[name][FIRST].cols.tolist())) for name in "abc"}) > 1, "they read unequal columns"
        backend, compiled = counting(masks["a"])
        run = torch.compile(base, backend=backend)
        held = [id(parameter) for parameter in base.parameters()]
        self.check(run, base, masks["a"])
        first = len(compiled)
        for name in "bcacb":
            sylva_compile.set_adapter(base, name)
            self.check(run, base, masks[name])
        assert len(compiled) == first
        assert [id(parameter) for parameter in base.parameters()] == held

    def test_one_that_comes_later_costs_a_graph_at_most(self, tmp_path: Path) -> None:
        base = frozen()
        for name in "abc":
            make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
        masks = {"a": sylva_compile.load_adapter(base, tmp_path / "a", "a")}
        backend, compiled = counting(masks["a"])
        run = torch.compile(base, backend=backend)
        self.check(run, base, masks["a"])
        first = len(compiled)
        masks |= {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "bc"}
        for name in "bcacb":
            sylva_compile.set_adapter(base, name)
            self.check(run, base, masks[name])
        assert len(compiled) <= first + 1

    def test_other_blocks_and_other_weights_are_compiled_anew(self, tmp_path: Path) -> None:
        base = frozen()
        make(base, tmp_path / "a", {FIRST: 9, SECOND: 5})
        make(base, tmp_path / "b", {SECOND: 2, HEAD: 2}, 16)
        masks = {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "ab"}
        run = torch.compile(base, backend=sylva_compile.backend(inner="aot_eager", on_miss="error"))
        for name in "abab":
            sylva_compile.set_adapter(base, name)
            self.check(run, base, masks[name])

    def test_a_backward_pass_of_another_adapter_is_refused(self, tmp_path: Path) -> None:
        base = frozen()
        for name in "ab":
            make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
        masks = {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "ab"}
        compiled = torch.compile(base, backend=sylva_compile.backend(masks["a"], inner="aot_eager"))
        runs: list[Any] = [base, compiled]
        for run in runs:
            sylva_compile.set_adapter(base, "a")
            loss = run(torch.randn(6, 40)).square().mean()
            sylva_compile.set_adapter(base, "b")
            with pytest.raises((EmbedError, RuntimeError), match=r"set another adapter|modified"):
                loss.backward()


class TestOptimizer:
    @pytest.mark.parametrize("rule", [sylva_compile.AdamW, torch.optim.AdamW])
    def test_states_start_anew(self, rule: Any, tmp_path: Path) -> None:
        base = frozen()
        for name in "ab":
            make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
        masks = {name: sylva_compile.load_adapter(base, tmp_path / name, name) for name in "ab"}
        optimizer = rule(masks["a"].parameters(), lr=0.02)
        train(base, masks["a"], optimizer)
        sylva_compile.set_adapter(base, "b")
        alone = frozen()
        alone.load_state_dict(base.state_dict())
        masks_alone = Masks(dict(masks["b"]), model=alone)
        fresh = rule(masks_alone.parameters(), lr=0.02)
        torch.manual_seed(1)
        train(base, masks["b"], optimizer)
        torch.manual_seed(1)
        train(alone, masks_alone, fresh)
        for ours, theirs in zip(masks["b"].parameters(), masks_alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_shared_weights_under_other_names(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).requires_grad_(False)
    base[1].weight = base[0].weight
    alone = {}
    for name in "01":
        model = copy.deepcopy(base)
        masks = choose(model, {f"{name}.weight": 4}, 8)
        with torch.no_grad():
            masks.parameters()[0].add_(1)
        sylva_compile.save_adapter(model, tmp_path / name)
        alone[name] = {key: value.clone() for key, value in model.state_dict().items()}
    for name in "01":
        sylva_compile.load_adapter(base, tmp_path / name, name)
    for name in "1010":
        sylva_compile.set_adapter(base, name)
        assert same(dict(base.state_dict()), alone[name])


def test_a_copy_has_its_own_adapters(tmp_path: Path) -> None:
    base = frozen()
    for name in "ab":
        make(base, tmp_path / name, {FIRST: 9, SECOND: 5})
    for name in "ab":
        sylva_compile.load_adapter(base, tmp_path / name, name)
    then = values(base)
    twin = copy.deepcopy(base)
    sylva_compile.set_adapter(twin, "b")
    assert same(values(base), then)
    assert sylva_compile.active_adapter(base) == "a"
    sylva_compile.set_adapter(base, "b")
    assert same(values(base), values(twin))


class TestOtherCalls:
    def two(self, tmp_path: Path, *, head: bool = False) -> Net:
        base = frozen()
        for name in "ab":
            make(base, tmp_path / name, {FIRST: 9, SECOND: 5}, head=head)
        for name in "ab":
            sylva_compile.load_adapter(base, tmp_path / name, name)
        return base

    def test_without_a_name_the_active_one_is_replaced(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        alone = values(base)
        train(base, sylva_compile.set_adapter(base, "a"))
        assert not same(values(base), alone)
        sylva_compile.load_adapter(base, tmp_path / "a")
        assert same(values(base), alone)
        assert sylva_compile.list_adapters(base) == ["a", "b"]
        assert sylva_compile.active_adapter(base) == "a"

    def test_merging_keeps_the_active_one(self, tmp_path: Path) -> None:
        base = self.two(tmp_path, head=True)
        sylva_compile.set_adapter(base, "b")
        then = dict(base.state_dict())
        sylva_compile.merge_and_unload(base)
        assert same(dict(base.state_dict()), then)
        assert sylva_compile.list_adapters(base) == []
        assert type(base.body[0]) is nn.Linear

    def test_the_count_of_parameters_is_that_of_one(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = self.two(tmp_path)
        one = copy.deepcopy(base)
        sylva_compile.delete_adapter(one, "b")
        for model in (base, one):
            sylva_compile.print_trainable_parameters(model)
        first, second = capsys.readouterr().out.splitlines()
        assert first == second

    def test_a_deleted_one_is_gone(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        sylva_compile.delete_adapter(base, "b")
        assert sylva_compile.list_adapters(base) == ["a"]
        with pytest.raises(AdapterError, match=r"No adapter 'b' is loaded, loaded are a; call load_adapter"):
            sylva_compile.set_adapter(base, "b")
        sylva_compile.load_adapter(base, tmp_path / "b", "b")
        sylva_compile.set_adapter(base, "b")

    def test_setting_the_active_one_changes_nothing(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        loss = base(torch.randn(6, 40)).square().mean()
        sylva_compile.set_adapter(base, "a")
        loss.backward()

    def test_a_head_of_the_active_one_is_not_taken_for_the_bases(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = frozen()
        make(base, tmp_path / "a", {FIRST: 9}, head=True)
        make(base, tmp_path / "b", {FIRST: 9})
        for name in "ab":
            sylva_compile.load_adapter(base, tmp_path / name, name)
        assert not caplog.text


class TestRefused:
    def refused(self, model: nn.Module, name: str, error: type[SylvaError], match: str) -> None:
        then, held = values(model), [id(parameter) for parameter in model.parameters()]
        active, kinds = sylva_compile.active_adapter(model), [type(module) for module in model.modules()]
        with pytest.raises(error, match=match) as caught:
            sylva_compile.set_adapter(model, name)
        assert "\n" not in str(caught.value)
        assert same(values(model), then)
        assert [id(parameter) for parameter in model.parameters()] == held
        assert [type(module) for module in model.modules()] == kinds
        assert sylva_compile.active_adapter(model) == active

    def two(self, tmp_path: Path, counts: dict[str, int] | None = None) -> Net:
        base = frozen()
        make(base, tmp_path / "a", {FIRST: 9, SECOND: 5})
        make(base, tmp_path / "b", counts or {FIRST: 9, SECOND: 5}, head=counts is None)
        for name in "ab":
            sylva_compile.load_adapter(base, tmp_path / name, name)
        return base

    def test_names(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        self.refused(base, "c", AdapterError, "No adapter 'c' is loaded, loaded are a, b;")
        with pytest.raises(AdapterError, match="none is; call load_adapter"):
            sylva_compile.set_adapter(frozen(), "c")
        with pytest.raises(AdapterError, match="'a' is active; set another one first"):
            sylva_compile.delete_adapter(base, "a")
        for name in "ab":
            with pytest.raises(AdapterError, match=f"An adapter '{name}' is loaded already"):
                sylva_compile.load_adapter(base, tmp_path / "a", name)

    def test_gradients(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        base(torch.randn(6, 40)).square().mean().backward()
        self.refused(base, "b", EmbedError, "have gradients")

    def test_a_disabled_adapter(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        with sylva_compile.disable_adapter(base):
            self.refused(base, "b", EmbedError, "inside of disable_adapter")

    def test_inference_mode(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        with torch.inference_mode():
            self.refused(base, "b", EmbedError, "inference_mode")

    def test_an_edited_base(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        with torch.no_grad():
            block_states(base)[FIRST].weight.mul_(2)
        self.refused(base, "b", EmbedError, "its base is not known")

    def test_another_base_since(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        base.load_state_dict(frozen().state_dict())
        self.refused(base, "b", AdapterError, "'b' was trained on another base: body.0.weight holds other values now")

    def test_another_base_where_only_the_other_one_has_blocks(self, tmp_path: Path) -> None:
        base = self.two(tmp_path, {SECOND: 5, HEAD: 4})
        with torch.no_grad():
            base.head.weight[0, 0] += 1
        self.refused(base, "b", AdapterError, "another base: head.weight")

    def test_a_module_that_cannot_carry_blocks(self, tmp_path: Path) -> None:
        base = self.two(tmp_path, {FIRST: 2, HEAD: 4})
        base.head.weight_blocks = "mine"
        optimizer = torch.optim.AdamW(sylva_compile.set_adapter(base, "a").parameters(), lr=0.1)
        base(torch.randn(6, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.refused(base, "b", EmbedError, "head.weight: its module has a weight_blocks of its own")
        assert len(optimizer.state) == 2
        del base.head.weight_blocks
        sylva_compile.set_adapter(base, "b")

    def test_a_head_that_was_replaced_since(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        base.head = nn.Linear(30, 7).requires_grad_(False)
        self.refused(base, "b", AdapterError, r"stores head\.weight \(20, 30\) of torch\.float32, \(7, 30\)")

    def test_loading_another_base(self, tmp_path: Path) -> None:
        base = self.two(tmp_path)
        make(frozen(), tmp_path / "c", {FIRST: 9, SECOND: 5})
        then = values(base)
        with pytest.raises(AdapterError, match=r"trained on another base: body\.0\.weight"):
            sylva_compile.load_adapter(base, tmp_path / "c", "c")
        assert same(values(base), then)
        assert sylva_compile.list_adapters(base) == ["a", "b"]


def test_one_adapter_stores_a_weight_whole_in_which_another_has_blocks(tmp_path: Path) -> None:
    """Each finds its base, whichever comes first, and the optimizer forgets the weight that was replaced."""
    case = tiny("llama")
    base = copy.deepcopy(case.model.requires_grad_(False))
    inside = sylva_compile.trace_and_mask(case.model, method="random", scope=["lm_head"], block_size=8, sparsity=0.9)
    inside.embed(case.model)
    with torch.no_grad():
        inside.parameters()[0].add_(1.0)
    sylva_compile.save_adapter(case.model, tmp_path / "blocks")
    sylva_compile.unload_adapter(case.model)
    masks = sylva_compile.trace_and_mask(case.model, method="random", block_size=8, sparsity=0.9)
    masks.embed(case.model)
    with torch.no_grad():
        case.model.lm_head.weight.add_(2.0)
    sylva_compile.save_adapter(case.model, tmp_path / "whole", modules_to_save=["lm_head"])
    for order in (("blocks", "whole"), ("whole", "blocks")):
        model = copy.deepcopy(base)
        for name in order:
            sylva_compile.load_adapter(model, tmp_path / name, name)
        for name in ("whole", "blocks", "whole"):
            sylva_compile.set_adapter(model, name)
            expected = base.lm_head.weight + 2.0 if name == "whole" else None
            if expected is not None:
                assert torch.equal(model.lm_head.weight, expected)
        optimizer = sylva_compile.AdamW([p for n, p in model.named_parameters() if n.endswith("_blocks")], lr=0.1)
        model.lm_head.weight.requires_grad_(True)
        optimizer.add_param_group({"params": [model.lm_head.weight]})
        model(**case.batch).loss.backward()
        with pytest.raises(EmbedError, match="gradient"):
            sylva_compile.set_adapter(model, "blocks")
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.state[model.lm_head.weight]
        model.lm_head.weight.requires_grad_(False)
        sylva_compile.set_adapter(model, "blocks")
        assert model.lm_head._parameters["weight"] not in optimizer.state
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.state_dict().items())
