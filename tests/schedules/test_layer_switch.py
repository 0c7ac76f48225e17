import copy
from typing import Any

import pytest
import torch
from tiny_models import Case, tiny
from torch import Tensor

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError
from sylva_compile.schedules import LayerSchedule, MovingBlocks


def llama() -> tuple[Case, Masks]:
    torch.manual_seed(0)
    case = tiny("llama", layers=4)
    case.model.requires_grad_(False)
    masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
    masks.embed()
    return case, masks


def gradients(case: Case, model: Any) -> dict[str, Tensor | None]:
    case.model.zero_grad()
    model(**case.batch).loss.backward()
    return {
        name: None if state.blocks.grad is None else state.blocks.grad.clone()
        for name, state in block_states(case.model).items()
    }


class TestGate:
    @pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
    def test_one_graph_serves_every_draw(self, inner: Any) -> None:
        torch._dynamo.reset()
        case, masks = llama()
        backend = None if inner == "eager" else sylva_compile.backend(masks, inner=inner, on_miss="error")
        model = case.model if backend is None else torch.compile(case.model, backend=backend)
        expected = gradients(case, model)
        schedule = LayerSchedule(masks, "random", fraction=0.5, mechanism="gate")
        gradients(case, model)
        draws = set()
        with torch.compiler.set_stance("fail_on_recompile" if backend else "default"):
            for _ in range(6):
                schedule.step()
                found = gradients(case, model)
                opened = {name for layer in schedule.drawn for name in schedule.layers[layer]}
                draws.add(str(schedule.drawn))
                for name, gradient in found.items():
                    assert (gradient is not None) == (name in opened)
                    if gradient is not None:
                        torch.testing.assert_close(gradient, expected[name])
        assert len(draws) > 2
        schedule.close()
        assert all(gradient is not None for gradient in gradients(case, model).values())

    def test_closed_layers_skip_their_products(self) -> None:
        torch._dynamo.reset()
        case, masks = llama()
        model = torch.compile(case.model, backend=sylva_compile.backend(masks, inner="aot_eager"))
        schedule = LayerSchedule(masks, "random", mechanism="gate")
        gradients(case, model)
        wrong = [layout.positions for name, layout in layouts(case) if name.split(".")[2] != schedule.drawn[0][-1]]
        for positions in wrong:
            # Whoever computes a product at these places gets an error.
            positions.data.fill_(1000)
        gradients(case, model)

    def test_optimizers_leave_closed_layers_alone(self) -> None:
        case, masks = llama()
        optimizer = torch.optim.AdamW(masks.parameters(), lr=0.1)
        schedule = LayerSchedule(masks, "random", mechanism="gate")
        for _ in range(4):
            before = {name: state.blocks.detach().clone() for name, state in block_states(case.model).items()}
            opened = {name for layer in schedule.drawn for name in schedule.layers[layer]}
            case.model(**case.batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            changed = {name for name in before if not torch.equal(before[name], block_states(case.model)[name].blocks)}
            assert changed == opened

    def test_another_schedule_and_a_copy_of_the_model_are_not_held_back(self) -> None:
        case, masks = llama()
        schedule = LayerSchedule(masks, "random", mechanism="gate")
        twin = copy.deepcopy(case)
        assert all(gradient is not None for gradient in gradients(twin, twin.model).values())
        LayerSchedule(masks, "random", mechanism="gate", fraction=1.0)
        assert all(gradient is not None for gradient in gradients(case, case.model).values())
        schedule.step()
        assert all(gradient is not None for gradient in gradients(case, case.model).values())

    def test_blocks_of_closed_layers_do_not_move(self) -> None:
        _, masks = llama()
        layers = LayerSchedule(masks, "random", mechanism="gate")
        before = dict(masks)
        MovingBlocks(masks, every=1).step()
        opened = {name for layer in layers.drawn for name in layers.layers[layer]}
        assert {name for name in masks if masks[name] != before[name]} == opened

    def test_other_mechanisms_are_refused(self) -> None:
        _, masks = llama()
        with pytest.raises(ArgumentError, match="use 'toggle' or 'gate'"):
            LayerSchedule(masks, "random", mechanism="switch")  # type: ignore[arg-type]


def layouts(case: Case) -> list[tuple[str, Any]]:
    return [(name, state.layout) for name, state in block_states(case.model).items()]
