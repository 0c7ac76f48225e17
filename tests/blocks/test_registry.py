"""Process-wide state: order, look-up, and what is installed in torch with the first state and goes with the last."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from oracle import random_masks
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks import registry
from sylva_compile.blocks.embed import block_states

NAMES = ["0.weight", "2.weight"]


@pytest.fixture(autouse=True)
def _no_other_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models of other tests may still be alive."""
    monkeypatch.setattr(registry, "_live", weakref.WeakKeyDictionary())
    monkeypatch.setattr(registry, "_sources", weakref.WeakKeyDictionary())
    monkeypatch.setattr(registry, "_added_sources", set())
    monkeypatch.setattr(registry, "_hooks", [])
    monkeypatch.setattr(registry, "_mapped_at", -1)
    yield
    for hook in registry._hooks:
        hook.remove()


def embedded() -> tuple[nn.Sequential, Masks]:
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    masks = random_masks(model, NAMES, 8, 0.5)
    masks.embed()
    return model, masks


def hooks() -> tuple[int, int]:
    return len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)


class TestOrder:
    def test_is_that_of_embedding(self) -> None:
        models = [embedded()[0] for _ in range(5)]
        states = [state for model in models for state in block_states(model).values()]
        assert registry.live_states() == states

    def test_stays_when_one_in_the_middle_goes(self) -> None:
        models = [embedded()[0] for _ in range(3)]
        sylva_compile.unload_adapter(models[1])
        expected = [state for model in (models[0], models[2]) for state in block_states(model).values()]
        assert registry.live_states() == expected

    def test_copies_and_unpickled_models_come_last(self) -> None:
        model, _ = embedded()
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        expected = [state for one in (model, *others) for state in block_states(one).values()]
        assert registry.live_states() == expected

    def test_adding_twice_is_adding_once(self) -> None:
        model, _ = embedded()
        states, changes = registry.live_states(), registry.changes()
        for state in states:
            registry.add(state)
        assert (registry.live_states(), registry.changes()) == (states, changes)
        assert model


class TestLookUp:
    def test_finds_the_state_of_each_tensor_by_its_role(self) -> None:
        model, _ = embedded()
        for state in block_states(model).values():
            assert registry.state_of_weight(state.weight) is state
            assert registry.state_of_blocks(state.blocks) is state
            assert registry.state_of_positions(state.layout.positions) is state
            assert registry.state_of_weight(state.blocks) is None
            assert registry.state_of_blocks(state.weight) is None
            assert registry.state_of_positions(state.weight) is None

    def test_other_values_belong_to_none(self) -> None:
        model, _ = embedded()
        assert registry.state_of_weight(model[0].bias) is None
        assert registry.state_of_positions(3) is None

    def test_follows_a_move_and_an_assignment(self) -> None:
        model, _ = embedded()
        before = model[0]._parameters["weight"]
        model.bfloat16()
        (state, _) = block_states(model).values()
        assert registry.state_of_weight(state.weight) is state
        assert registry.state_of_blocks(state.blocks) is state
        model[0].weight = nn.Parameter(torch.randn(24, 16, dtype=torch.bfloat16))
        assert registry.state_of_weight(state.weight) is state
        assert registry.state_of_weight(before) is None

    def test_an_address_that_is_used_again_belongs_to_none(self) -> None:
        model, _ = embedded()
        assert registry.state_of_weight(model[0]._parameters["weight"]) is not None
        del model
        gc.collect()
        strangers = [nn.Parameter(torch.randn(24, 16)) for _ in range(200)]
        assert all(registry.state_of_weight(stranger) is None for stranger in strangers)

    def test_unloaded_weights_belong_to_none(self) -> None:
        model, _ = embedded()
        sylva_compile.unload_adapter(model)
        assert registry.state_of_weight(model[0].weight) is None


class TestHooks:
    def test_come_with_the_first_and_go_with_the_last(self) -> None:
        nothing = hooks()
        first, _ = embedded()
        one = hooks()
        assert one == (nothing[0] + 1, nothing[1] + 1)
        second, _ = embedded()
        assert hooks() == one
        sylva_compile.merge_and_unload(first)
        assert hooks() == one
        sylva_compile.unload_adapter(second)
        assert hooks() == nothing

    def test_of_a_collected_model_do_nothing_and_go_with_the_next_call(self) -> None:
        nothing = hooks()
        model, _ = embedded()
        del model
        gc.collect()
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        torch.optim.SGD([weight], lr=1.0).step()
        registry.tidy()
        assert hooks() == nothing

    def test_a_failed_embedding_leaves_none(self) -> None:
        class Stubborn(nn.Linear):
            def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
                if name.endswith("_blocks"):
                    raise RuntimeError("no room")
                super().register_parameter(name, param)

        nothing = hooks()
        model = nn.Sequential(nn.Linear(16, 16), Stubborn(16, 16))
        with pytest.raises(sylva_compile.SylvaError, match="cannot carry blocks"):
            random_masks(model, ["0.weight", "1.weight"], 8, 0.5).embed()
        assert (hooks(), registry.live_states()) == (nothing, [])


class TestDynamicSources:
    def test_are_added_and_withdrawn_with_the_last_state_that_asked(self) -> None:
        with torch.compiler.config.patch(dynamic_sources="mine"):
            first, second = embedded()[0], embedded()[0]
            ask = registry.let_blocks_vary
            ask(block_states(first).values(), "L['self'].blocks")
            ask(block_states(second).values(), "L['self'].blocks")
            ask(block_states(second).values(), "L['other'].blocks")
            assert torch.compiler.config.dynamic_sources == "mine,L['self'].blocks,L['other'].blocks"
            sylva_compile.unload_adapter(second)
            assert torch.compiler.config.dynamic_sources == "mine,L['self'].blocks"
            sylva_compile.unload_adapter(first)
            assert torch.compiler.config.dynamic_sources == "mine"

    def test_a_name_that_the_user_listed_stays(self) -> None:
        with torch.compiler.config.patch(dynamic_sources="mine"):
            model, _ = embedded()
            registry.let_blocks_vary(block_states(model).values(), "mine")
            sylva_compile.unload_adapter(model)
            assert torch.compiler.config.dynamic_sources == "mine"
