"""Process-wide state: order, look-up, and what is installed in torch with the first state and goes with the last."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import random_masks
from torch import Tensor, nn
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
)

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
    monkeypatch.setattr(registry, "_by_tensor", (-1, {}))
    yield
    for hook in registry._hooks:
        hook.remove()


def embedded() -> tuple[nn.Sequential, Masks]:
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    masks = random_masks(model, NAMES, 8, 0.5)
    masks.embed()
    return model, masks


def mean_square(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.randn(4, 16)).square().mean()
    return loss


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

    def test_unloading_inside_of_another_hook_waits_for_the_end_of_the_step(self) -> None:
        nothing = hooks()
        held: list[nn.Module] = []
        handle = register_optimizer_step_post_hook(
            lambda *_: sylva_compile.unload_adapter(held.pop()) if held else None
        )
        try:
            model, masks = embedded()
            held.append(model)
            mean_square(model).backward()
            torch.optim.SGD(masks.parameters(), lr=1.0).step()
            registry.tidy()
            assert hooks() == (nothing[0], nothing[1] + 1)
        finally:
            handle.remove()


class TestCopies:
    def test_of_a_class_that_copies_its_attributes_itself_are_followed(self) -> None:
        class Own(nn.Linear):
            def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
                made = type(self).__new__(type(self))
                memo[id(self)] = made
                made.__dict__ = {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
                return made

        model = nn.Sequential(Own(16, 24), nn.GELU(), nn.Linear(24, 16))
        random_masks(model, NAMES, 8, 0.5).embed()
        twin = copy.deepcopy(model)
        for state in block_states(twin).values():
            assert registry.state_of_blocks(state.blocks) is state
        blocks = [state.blocks for state in block_states(twin).values()]
        mean_square(twin).backward()
        torch.optim.SGD(blocks, lr=1.0).step()
        assert all(state.is_synced() for state in block_states(twin).values())

    def test_of_a_state_alone_are_followed(self) -> None:
        model, _ = embedded()
        (state, _) = block_states(model).values()
        twin = copy.deepcopy(state)
        assert registry.state_of_blocks(twin.blocks) is twin
        assert twin.writer.positions is twin.layout.positions


class TestThreads:
    def test_look_ups_beside_changes_find_their_state(self) -> None:
        model, _ = embedded()
        weights = [state.weight for state in block_states(model).values()]
        missed: list[int] = []

        def look_up() -> None:
            for at in range(3000):
                if at % 3 == 0:
                    registry.note_change()
                missed.extend(id(weight) for weight in weights if registry.state_of_weight(weight) is None)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=look_up) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not missed


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
