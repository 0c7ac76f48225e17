import copy
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_invariant
from tiny_models import Case, tiny
from torch import nn

import sylva_compile
from sylva_compile import Masks, SylvaConfig
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.schedules import MovingBlocks
from sylva_compile.schedules.importance import _suppressed


def llama(dtype: torch.dtype = torch.float32) -> tuple[Case, Masks]:
    torch.manual_seed(0)
    case = tiny("llama")
    case.model.to(dtype).requires_grad_(False)
    return case, sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)


def train(case: Case, schedule: MovingBlocks, optimizer: torch.optim.Optimizer, steps: int, model: Any = None) -> None:
    for _ in range(steps):
        (case.model if model is None else model)(**case.batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestMoves:
    @pytest.mark.parametrize("choose", ["random", "cycle", "gradient", "sketch"])
    def test_blocks_move_every_few_steps(self, choose: Any) -> None:
        case, masks = llama()
        base = copy.deepcopy(case.model.state_dict())
        schedule = MovingBlocks(masks, every=3, choose=choose)
        optimizer = sylva_compile.optim.Muon(masks.parameters(), lr=0.01)
        places = [dict(masks)]
        for _ in range(9):
            train(case, schedule, optimizer, 1)
            places.append(dict(masks))
            assert_invariant(case.model, masks)
        moved = [before != after for before, after in itertools.pairwise(places)]
        assert moved == [False, False, True] * 3
        assert schedule.moves == masks.config["moves"] == 3
        assert all(state.layout.scores is None for state in block_states(case.model).values())
        sylva_compile.unload_adapter(case.model)
        assert all(torch.equal(value, base[name]) for name, value in case.model.state_dict().items())

    @pytest.mark.parametrize("choose", ["gain", "greedy"])
    def test_blocks_go_where_a_new_trace_sends_them(self, choose: Any) -> None:
        case, masks = llama()
        schedule = MovingBlocks(
            masks, 2, choose, loader=[case.batch], config=SylvaConfig(num_samples=4, progress=False), temperature=0.0
        )
        optimizer = sylva_compile.optim.Muon(masks.parameters(), lr=0.01)
        train(case, schedule, optimizer, 2)
        merged = copy.deepcopy(case.model)
        sylva_compile.merge_and_unload(merged)
        merged.requires_grad_(False)
        options = {"sparsity": 0.8, "block_size": 8, "num_samples": 4, "score": choose, "progress": False}
        expected = sylva_compile.trace_and_mask(merged, [case.batch], **options)
        assert dict(masks) == dict(expected)
        assert all(blocks.requires_grad for blocks in masks.parameters())

    def test_traces_of_moves_leave_a_checkpoint_alone(self, tmp_path: Path) -> None:
        case, masks = llama()
        config = SylvaConfig(num_samples=4, progress=False, checkpoint=str(tmp_path / "trace"), checkpoint_every=1)
        schedule = MovingBlocks(masks, 1, "gain", loader=[case.batch], config=config)
        train(case, schedule, torch.optim.SGD(masks.parameters(), lr=0.1), 2)
        assert schedule.moves == 2
        assert not list(tmp_path.iterdir())

    def test_a_trace_without_any_gradient_moves_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        model = nn.Sequential(nn.Linear(32, 32, bias=False)).requires_grad_(False)
        masks = Masks.from_block_maps(model, {"0.weight": torch.eye(4, dtype=torch.bool)}, 8)
        config = SylvaConfig(num_samples=5, progress=False)
        schedule = MovingBlocks(
            masks, 1, "greedy", loader=[torch.ones(5, 32)], loss_fn=lambda m, x: m(x).sum() * 0, config=config
        )
        schedule.step()
        assert schedule.moves == 0
        assert "none moves" in caplog.text

    def test_high_norms_are_chosen_at_temperature_zero(self) -> None:
        model = nn.Sequential(nn.Linear(32, 32, bias=False)).requires_grad_(False)
        masks = Masks.from_block_maps(model, {"0.weight": torch.eye(4, dtype=torch.bool)}, 8)
        schedule = MovingBlocks(masks, every=1, choose="gradient", temperature=0.0)
        x = torch.zeros(5, 32)
        x[:, 8:16] = 1.0
        model(x).square().sum().backward()
        schedule.step()
        assert masks["0.weight"].cols.tolist() == [1, 1, 1, 1]

    def test_a_gradient_that_is_not_finite_moves_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        case, masks = llama()
        schedule = MovingBlocks(masks, every=1, choose="sketch")
        before = dict(masks)
        (case.model(**case.batch).loss * torch.inf).backward()
        schedule.step()
        assert dict(masks) == before
        assert "not finite" in caplog.text
        case.model(**case.batch).loss.backward()
        schedule.step()
        assert dict(masks) != before

    def test_layers_that_are_switched_off_stay(self) -> None:
        case, masks = llama()
        schedule = MovingBlocks(masks, every=1)
        masks.embed()
        before = dict(masks)
        off = [name for name in masks if ".layers.0." in name]
        for name in off:
            block_states(case.model)[name].blocks.requires_grad_(False)
        schedule.step()
        assert {name for name in masks if masks[name] == before[name]} == set(off)

    def test_a_schedule_of_blocks_that_are_gone_says_so(self) -> None:
        case, masks = llama()
        schedule = MovingBlocks(masks, every=1)
        sylva_compile.unload_adapter(case.model)
        with pytest.raises(EmbedError, match="make a new one"):
            schedule.step()
        masks.embed()
        with pytest.raises(EmbedError, match="make a new one"):
            schedule.step()

    def test_nothing_scored_is_no_move(self, caplog: pytest.LogCaptureFixture) -> None:
        _, masks = llama()
        schedule = MovingBlocks(masks, every=1, choose="sketch")
        schedule.step()
        assert schedule.moves == 0
        assert "No block was scored" in caplog.text


class TestColumnBudget:
    @pytest.mark.parametrize("choose", ["random", "sketch"])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_weights_of_a_layer_lie_in_the_same_columns_and_nothing_compiles_again(
        self, choose: Any, architecture: str
    ) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        case = tiny(architecture)
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)
        schedule = MovingBlocks(masks, every=2, choose=choose, column_budget=0.5)
        optimizer = sylva_compile.optim.Muon(masks.parameters(), lr=0.01)
        compiled = torch.compile(case.model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
        train(case, schedule, optimizer, 3, compiled)
        seen = set()
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(6):
                train(case, schedule, optimizer, 1, compiled)
                columns: dict[tuple[str, int], set[int]] = {}
                for name, state in block_states(case.model).items():
                    assert state.layout.input_channels.shape[0] == state.mask.shape[state.layout.input_axis] // 2
                    layer = name.split(".")[2], state.mask.shape[state.layout.input_axis]
                    columns.setdefault(layer, set()).update(state.mask.positions[state.layout.input_axis].tolist())
                assert all(len(chosen) <= width // 8 // 2 for (_, width), chosen in columns.items())
                seen.add(str(sorted(columns.items(), key=str)))
        assert len(seen) > 2

    def test_columns_without_room_are_refused(self) -> None:
        _, masks = llama()
        with pytest.raises(ArgumentError, match="leaves room for 4 of its"):
            MovingBlocks(masks, column_budget=0.01)


class TestResume:
    @pytest.mark.parametrize("choose", ["random", "cycle", "sketch"])
    @pytest.mark.parametrize("model_first", [False, True])
    @pytest.mark.parametrize("at", [3, 4])
    def test_an_interrupted_training_ends_like_the_undisturbed_one(
        self, choose: Any, model_first: bool, at: int
    ) -> None:
        def make() -> tuple[Case, Masks, MovingBlocks, torch.optim.Optimizer]:
            case, masks = llama(torch.bfloat16)
            schedule = MovingBlocks(masks, every=2, choose=choose, carry="intersection", rounding="stochastic")
            return case, masks, schedule, sylva_compile.AdamW(masks.parameters(), lr=0.01)

        case, masks, schedule, optimizer = make()
        base = copy.deepcopy(case.model.state_dict())
        train(case, schedule, optimizer, at)
        saved = through_a_file([case.model.state_dict(), schedule.state_dict(), optimizer.state_dict()])
        train(case, schedule, optimizer, 5)

        again, its_masks, its_schedule, its_optimizer = make()
        if model_first:
            again.model.load_state_dict(saved[0])
        its_schedule.load_state_dict(saved[1])
        if not model_first:
            again.model.load_state_dict(saved[0])
        its_optimizer.load_state_dict(saved[2])
        train(again, its_schedule, its_optimizer, 5)
        assert dict(its_masks) == dict(masks)
        for mine, its in zip(masks.parameters(), its_masks.parameters(), strict=True):
            assert torch.equal(mine, its)
        assert all(
            torch.equal(value, again.model.state_dict()[name]) for name, value in case.model.state_dict().items()
        )
        sylva_compile.unload_adapter(again.model)
        assert all(torch.equal(value, base[name]) for name, value in again.model.state_dict().items())

    @pytest.mark.parametrize("model_first", [False, True])
    def test_going_back_in_one_process_keeps_the_base(self, model_first: bool, tmp_path: Path) -> None:
        case, masks = llama()
        base = copy.deepcopy(case.model.state_dict())
        schedule = MovingBlocks(masks, every=1)
        optimizer = sylva_compile.optim.Muon(masks.parameters(), lr=0.01)
        train(case, schedule, optimizer, 2)
        saved = through_a_file([case.model.state_dict(), schedule.state_dict()])
        train(case, schedule, optimizer, 4)
        if model_first:
            case.model.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        case.model.load_state_dict(saved[0])
        assert all(torch.equal(value, saved[0][name]) for name, value in case.model.state_dict().items())
        assert schedule.moves == masks.config["moves"] == 2
        sylva_compile.save_adapter(case.model, tmp_path)
        config = json.loads((tmp_path / "sylva_adapter.json").read_text())
        assert config["masks"]["moves"] == 2
        assert config["masks"]["schedule"]["every"] == 1
        sylva_compile.unload_adapter(case.model)
        assert all(torch.equal(value, base[name]) for name, value in case.model.state_dict().items())
        sylva_compile.load_adapter(case.model, tmp_path)
        assert all(torch.equal(value, saved[0][name]) for name, value in case.model.state_dict().items())

    def test_states_of_others_are_refused(self) -> None:
        case, masks = llama()
        schedule = MovingBlocks(masks)
        state = schedule.state_dict()
        first, known = next(iter(state["weights"].items()))
        before = dict(masks)
        for change, message in (
            ({"format": "other"}, "no state of MovingBlocks"),
            ({"settings": {}}, "make it with the same settings"),
            ({"weights": dict(list(state["weights"].items())[1:])}, "but not in both"),
            ({"weights": {**state["weights"], first: {**known, "originals": known["originals"][:1]}}}, "do not fit"),
        ):
            with pytest.raises(ArgumentError, match=message):
                schedule.load_state_dict({**state, **change})
        case.model(**case.batch).loss.backward()
        with pytest.raises(EmbedError, match="have gradients"):
            schedule.load_state_dict(state)
        assert dict(masks) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"choose": "best"}, "choose='best'"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"column_budget": 1.5}, "column_budget=1.5"),
        ({"column_budget": 0.5, "choose": "cycle"}, "visits all columns"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"choose": "gain"}, "give a loader"),
        ({"choose": "gain", "loader": iter([])}, "a list or a DataLoader"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    _, masks = llama()
    with pytest.raises(ArgumentError, match=message):
        MovingBlocks(masks, **options)


def test_importance_is_measured_on_what_all_places_have_learnt() -> None:
    case, masks = llama()
    base = copy.deepcopy(case.model.state_dict())
    schedule = MovingBlocks(masks, every=1)
    train(case, schedule, sylva_compile.optim.Muon(masks.parameters(), lr=0.01), 4)
    trained = copy.deepcopy(case.model.state_dict())
    with _suppressed(list(block_states(case.model).values()), 0.25):
        for name in masks:
            change = case.model.state_dict()[name] - base[name]
            torch.testing.assert_close(change, 0.25 * (trained[name] - base[name]), rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, trained[name]) for name, value in case.model.state_dict().items())
    assert_invariant(case.model, masks)
