"""Layers are drawn as IST and RST say, and those that are not drawn stay as they are, bit for bit."""

import copy
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from oracle import assert_invariant, random_masks
from tiny_models import tiny
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError, EmbedError, TraceError
from sylva_compile.optim import Muon
from sylva_compile.schedules.layers import LayerSchedule

# The 99.9% quantiles of chi-square, by degrees of freedom.
QUANTILE = {3: 16.27, 5: 20.52, 14: 36.12}


class Stack(nn.Module):
    """Linear layers in a list, a head outside of it, and a dropout to tell training from evaluation."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 16, bias=False)
        self.layers = nn.ModuleList(nn.Linear(16, 20 if i == depth - 1 else 16, bias=False) for i in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(20, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.dropout(x))


class Layer(nn.Module):
    """One layer with code of its own, which Dynamo compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def stack(depth: int, dtype: torch.dtype = torch.float32) -> tuple[Stack, Masks]:
    model = Stack(depth).to(dtype).requires_grad_(False)
    masks = random_masks(model, [*(f"layers.{i}.weight" for i in range(depth)), "head.weight"], 8, 0.7)
    masks.embed()
    return model, masks


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def fit(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def no_loss(model: nn.Module, batch: Any) -> Tensor:
    return torch.zeros(())


def shift(masks: Masks, size: float = 0.3) -> None:
    """Give every block a trained change."""
    with torch.no_grad():
        for blocks in masks.parameters():
            blocks.add_(size * torch.randn_like(blocks))
    masks.write_through()


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def trained_layers(masks: Masks) -> list[str]:
    assert masks.model is not None
    states = block_states(masks.model)
    return [layer_of(name) for name, state in states.items() if state.blocks.requires_grad and name != "head.weight"]


def chi_square(counts: Counter[Any], probabilities: dict[Any, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    return sum((counts[key] - total * p) ** 2 / (total * p) for key, p in probabilities.items())


def with_scores(schedule: LayerSchedule, scores: Sequence[float]) -> LayerSchedule:
    schedule.load_state_dict(schedule.state_dict() | {"scores": torch.tensor(scores)})
    return schedule


class Watch:
    """A loss that notes which layers' trained change is scaled down whenever it is called."""

    def __init__(self, masks: Masks) -> None:
        assert masks.model is not None
        self.trained = {name: masks.model.get_parameter(name).detach().clone() for name in masks}
        self.actions: list[tuple[int, ...]] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        changed = [name for name, value in self.trained.items() if not torch.equal(model.get_parameter(name), value)]
        self.actions.append(tuple(int(name.split(".")[1]) for name in changed))
        return torch.zeros(())


class TestDraws:
    def test_random_draws_are_uniform_and_without_repetition(self) -> None:
        _, masks = stack(6)
        schedule = LayerSchedule(masks, "random", fraction=0.34, seed=1)
        drawn: Counter[tuple[str, ...]] = Counter()
        for _ in range(3000):
            schedule.step()
            drawn[tuple(schedule.drawn)] += 1
            assert trained_layers(masks) == schedule.drawn
        pairs = list(itertools.combinations(schedule.layers, 2))
        assert chi_square(drawn, dict.fromkeys(pairs, 1 / 15)) < QUANTILE[14]

    def test_importance_draws_by_the_sigmoid_of_minus_the_score(self) -> None:
        _, masks = stack(4)
        scores = [2.0, 0.0, -1.0, -3.0]
        schedule = with_scores(LayerSchedule(masks, fraction=0.5, every=10**9, batches=[0]), scores)
        weight = {f"layers.{i}": 1 / (1 + math.exp(score)) for i, score in enumerate(scores)}
        total = sum(weight.values())
        expected = {
            (a, b): weight[a] * weight[b] / total * (1 / (total - weight[a]) + 1 / (total - weight[b]))
            for a, b in itertools.combinations(weight, 2)
        }
        assert sum(expected.values()) == pytest.approx(1.0)
        drawn: Counter[tuple[str, ...]] = Counter()
        for _ in range(3000):
            schedule.step()
            drawn[tuple(schedule.drawn)] += 1
        assert chi_square(drawn, expected) < QUANTILE[5]

    def test_actions_are_distinct_and_drawn_by_the_sigmoid_of_the_score(self) -> None:
        _, masks = stack(4)
        shift(masks)
        scores = [2.0, 0.0, -1.0, -3.0]
        watch = Watch(masks)
        schedule = with_scores(LayerSchedule(masks, every=1, batches=[0], loss=watch), scores)
        for _ in range(800):
            schedule.step()
        actions = [watch.actions[at : at + 3] for at in range(0, len(watch.actions), 3)]
        assert len(actions) == 800
        assert all(len(set(three)) == 3 and all(len(action) == 2 for action in three) for three in actions)
        weight = [1 / (1 + math.exp(-score)) for score in scores]
        total = sum(weight)
        expected = {
            (a, b): weight[a] * weight[b] / total * (1 / (total - weight[a]) + 1 / (total - weight[b]))
            for a, b in itertools.combinations(range(4), 2)
        }
        assert chi_square(Counter(three[0] for three in actions), expected) < QUANTILE[5]
        # Equal losses are no reason to change a score.
        assert [row.score for row in schedule.report().layers] == scores

    def test_the_global_generator_is_left_alone(self) -> None:
        _, masks = stack(4)
        loader: Any = torch.utils.data.DataLoader(torch.arange(8.0), shuffle=True)
        before = torch.get_rng_state()
        schedule = LayerSchedule(masks, every=1, batches=loader, loss=lambda model, batch: torch.rand(()))
        for _ in range(20):
            schedule.step()
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_seed_is_a_sequence(self) -> None:
        _, masks = stack(6)

        def draws(seed: int) -> list[list[str]]:
            schedule = LayerSchedule(masks, "random", fraction=0.5, seed=seed)
            return [schedule.drawn for _ in range(10) if schedule.step() is None]

        assert draws(3) == draws(3) != draws(4)

    @pytest.mark.parametrize(("fraction", "size"), [(0.01, 1), (0.5, 3), (0.99, 5), (1.0, 6)])
    def test_the_number_of_layers(self, fraction: float, size: int) -> None:
        _, masks = stack(6)
        assert len(LayerSchedule(masks, "random", fraction=fraction).drawn) == size

    @pytest.mark.parametrize("score", [800.0, -800.0])
    def test_scores_whose_sigmoid_is_zero(self, score: float) -> None:
        _, masks = stack(4)
        schedule = with_scores(LayerSchedule(masks, fraction=0.5, every=1, batches=[0], loss=no_loss), [score] * 4)
        schedule.step()
        assert len(schedule.drawn) == 2

    @pytest.mark.parametrize(("depth", "losses"), [(2, 2), (3, 3)])
    @pytest.mark.parametrize("scores", [(0.0, 0.0, 0.0), (800.0, -800.0, -800.0), (50.0, 50.0, -50.0)])
    def test_few_layers(self, depth: int, losses: int, scores: tuple[float, ...]) -> None:
        _, masks = stack(depth)
        shift(masks)
        watch = Watch(masks)
        schedule = with_scores(LayerSchedule(masks, every=1, batches=[0], loss=watch), scores[:depth])
        schedule.step()
        schedule.step()
        # Actions of one layer each, and no more than there are.
        assert sorted(watch.actions[:losses]) == [(i,) for i in range(depth)]
        assert len(watch.actions) == 2 * losses
        assert len(schedule.drawn) == 1


class TestScores:
    def test_against_the_equations_in_float64(self) -> None:
        model, masks = stack(5, torch.float64)
        base = {name: model.get_parameter(name).detach().clone() for name in masks}
        plain = copy.deepcopy(model)
        sylva_compile.merge_and_unload(plain)
        batches = [torch.randn(3, 16, dtype=torch.float64) for _ in range(4)]
        schedule = LayerSchedule(masks, fraction=0.4, every=3, suppress=0.4, seed=7, batches=batches, loss=fit)
        optimizer = torch.optim.Adam(masks.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(7)
        scores = torch.zeros(5, dtype=torch.float64)
        number = itertools.count()

        def draw(weights: Tensor, size: int) -> list[int]:
            return sorted(torch.multinomial(weights, size, generator=generator).tolist())

        drawn = draw(torch.sigmoid(-scores), 2)
        for step in range(1, 31):
            assert schedule.drawn == [f"layers.{i}" for i in drawn]
            fit(model, batches[step % 4]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 3 == 0:
                batch = batches[next(number) % 4]
                actions: list[list[int]] = []
                while len(actions) < 3:
                    action = draw(torch.sigmoid(scores), 2)
                    actions += [action] if action not in actions else []
                losses = []
                for action in actions:
                    weights = {name: model.get_parameter(name).detach() for name in masks}
                    for i in action:
                        name = f"layers.{i}.weight"
                        weights[name] = base[name] + 0.4 * (weights[name] - base[name])
                    with torch.no_grad():
                        found = torch.func.functional_call(plain.eval(), weights, (batch,))
                        losses.append(math.exp(-float((found - 1).square().mean())))
                p = [1 / (1 + math.exp(-float(score))) for score in scores]
                for action, reward in zip(actions, losses, strict=True):
                    for i in action:
                        scores[i] += 10 * (reward - sum(losses) / 3) * p[i] * (1 - p[i])
            drawn = draw(torch.sigmoid(-scores), 2)
            found = torch.tensor([row.score for row in schedule.report().layers], dtype=torch.float64)
            torch.testing.assert_close(found, scores, rtol=1e-9, atol=1e-12)
        assert scores.abs().min() > 0.01

    def test_planted_importance_is_found(self) -> None:
        model, masks = stack(8)
        shift(masks)
        trained = {i: model.layers[i].weight.detach().clone() for i in (2, 5)}

        def loss(model: Any, batch: Any) -> Tensor:
            lost = [(model.layers[i].weight - value).square().mean() for i, value in trained.items()]
            return 20 * torch.stack(lost).sum()

        schedule = LayerSchedule(masks, every=1, batches=[0], loss=loss, seed=2)
        for _ in range(300):
            schedule.step()
        rows = schedule.report().layers
        by_score = sorted(rows, key=lambda row: row.score)
        assert {row.name for row in by_score[:2]} == {"layers.2", "layers.5"}
        by_draws = sorted(rows, key=lambda row: -row.times_drawn)
        assert {row.name for row in by_draws[:2]} == {"layers.2", "layers.5"}
        assert sum(row.times_drawn for row in rows) == 2 * 301

    def test_a_loss_that_is_not_finite_changes_no_score(self, caplog: pytest.LogCaptureFixture) -> None:
        _, masks = stack(4)
        losses = itertools.cycle([0.0, 1.0, math.nan])
        schedule = LayerSchedule(masks, every=1, batches=[0], loss=lambda model, batch: torch.tensor(next(losses)))
        schedule.step()
        assert [row.score for row in schedule.report().layers] == [0.0] * 4
        assert "not finite" in caplog.text

    def test_an_infinite_loss_is_the_worst(self) -> None:
        _, masks = stack(3)
        losses = iter([0.0, math.inf, 0.0])
        schedule = LayerSchedule(masks, every=1, batches=[0], loss=lambda model, batch: torch.tensor(next(losses)))
        schedule.step()
        assert sorted(row.score for row in schedule.report().layers) == pytest.approx([-2.5 * 2 / 3, 2.5 / 3, 2.5 / 3])

    def test_every_ten_steps_and_batches_begun_again(self) -> None:
        _, masks = stack(4)
        seen: list[int] = []

        def loss(model: nn.Module, batch: int) -> Tensor:
            seen.append(batch)
            return torch.zeros(())

        schedule = LayerSchedule(masks, batches=[1, 2], loss=loss)
        for step in range(1, 41):
            schedule.step()
            assert len(seen) == 3 * (step // 10)
        assert seen == [1, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2, 2]

    def test_a_mapping_is_the_call_of_the_model(self) -> None:
        case = tiny("llama", layers=2)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        masks.embed()
        shift(masks)
        schedule = LayerSchedule(masks, every=1, batches=[case.batch])
        schedule.step()
        assert any(row.score for row in schedule.report().layers)


class TestClosedLayers:
    @pytest.mark.parametrize("kind", ["adamw", "muon", "torch"])
    def test_stay_bit_for_bit(self, kind: str) -> None:
        model, masks = stack(6)
        make: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": sylva_compile.AdamW,
            "muon": Muon,
            "torch": torch.optim.AdamW,
        }
        optimizer = make[kind](masks.parameters(), lr=1e-2, weight_decay=0.1)
        states = block_states(model)

        def snapshot(name: str) -> list[Tensor]:
            blocks = states[name].blocks
            kept = [value for value in optimizer.state[blocks].values() if isinstance(value, Tensor)]
            return [value.detach().clone() for value in (blocks, states[name].weight, *kept)]

        for _ in range(2):
            square(model, torch.randn(8, 16)).backward()
            optimizer.step()
        # The last gradients are still there, and those of closed layers must not be stepped with.
        schedule = LayerSchedule(masks, "random", fraction=0.34, seed=5)
        seen = set()
        for _ in range(12):
            is_open = {name: layer_of(name) in schedule.drawn or name == "head.weight" for name in masks}
            seen.add(tuple(schedule.drawn))
            before = {name: snapshot(name) for name in masks}
            assert all(states[name].blocks.grad is None for name in masks if not is_open[name])
            square(model, torch.randn(8, 16)).backward()
            assert {name: states[name].blocks.grad is not None for name in masks} == is_open
            optimizer.step()
            for name in masks:
                same = [torch.equal(a, b) for a, b in zip(before[name], snapshot(name), strict=True)]
                assert len(same) >= 3
                assert all(same) if not is_open[name] else not any(same[:3]), name
            assert_invariant(model, masks)
            schedule.step()
            # As in a Trainer, gradients are dropped after the schedule's step.
            optimizer.zero_grad()
        assert len(seen) > 3

    def test_the_backward_pass_ends_at_the_lowest_open_layer(self) -> None:
        case = tiny("llama", layers=4)
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        schedule = LayerSchedule(masks, "random")
        flags: dict[int, bool] = {}
        for index, layer in enumerate(case.model.model.layers):
            layer.register_forward_hook(lambda m, a, out, index=index: flags.update({index: out.requires_grad}))
        lowest = set()
        for _ in range(12):
            case.model(**case.batch).loss.backward()
            drawn = int(schedule.drawn[0].rpartition(".")[2])
            assert flags == {index: index >= drawn for index in range(4)}
            lowest.add(drawn)
            schedule.step()
        assert len(lowest) > 1

    def test_close_and_the_context_manager_open_all(self) -> None:
        _, masks = stack(4)
        with LayerSchedule(masks, "random") as schedule:
            assert len(trained_layers(masks)) == 1
        assert trained_layers(masks) == schedule.drawn == list(schedule.layers)
        schedule.step()
        assert trained_layers(masks) == list(schedule.layers)
        with pytest.raises(KeyError), LayerSchedule(masks, "random"):
            raise KeyError
        assert len(trained_layers(masks)) == 4


class TestMeasuring:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_is_put_back(self, dtype: torch.dtype, fails: bool) -> None:
        model, masks = stack(4, dtype)
        base = {name: model.get_parameter(name).detach().clone() for name in masks}
        shift(masks)
        model.layers[1].eval()
        states = block_states(model)
        modes = {module: module.training for module in model.modules()}
        trained = {name: model.get_parameter(name).detach().clone() for name in masks}
        masters = {name: state.blocks.detach().clone() for name, state in states.items()}
        identities = {name: (id(state.blocks), id(state.weight)) for name, state in states.items()}
        calls = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            assert not torch.is_grad_enabled() and not any(module.training for module in model.modules())
            changed = [name for name in masks if not torch.equal(model.get_parameter(name), trained[name])]
            assert len(changed) == 2
            for name in changed:
                state = states[name]
                inside = masks[name].dense()
                wide = state.blocks.dtype
                blocks = torch.zeros_like(trained[name], dtype=wide)
                state.writer.write(blocks, masters[name])
                expected = (base[name].to(wide) + 0.25 * (blocks - base[name].to(wide))).to(dtype)
                assert torch.equal(model.get_parameter(name), torch.where(inside, expected, trained[name]))
            calls.append(changed)
            if fails and len(calls) == 2:
                raise KeyError
            return square(model, batch)

        schedule = LayerSchedule(masks, every=1, batches=[torch.randn(3, 16, dtype=dtype)], loss=loss)
        drawn = schedule.drawn
        for blocks in masks.parameters():
            blocks.grad = torch.ones_like(blocks) if blocks.requires_grad else None
        if fails:
            with pytest.raises(KeyError):
                schedule.step()
            assert schedule.drawn == trained_layers(masks) == drawn
            assert all((state.blocks.grad is not None) == state.blocks.requires_grad for state in states.values())
        else:
            schedule.step()
        assert len(calls) == 2 if fails else 3
        assert modes == {module: module.training for module in model.modules()}
        for name, state in states.items():
            assert torch.equal(state.weight, trained[name])
            assert torch.equal(state.blocks, masters[name])
            assert (id(state.blocks), id(state.weight)) == identities[name]
            state.sync()
            assert torch.equal(state.weight, trained[name]) and torch.equal(state.blocks, masters[name])
            assert state.base_known
        if dtype == torch.bfloat16:
            assert not all(torch.equal(value, value.bfloat16().float()) for value in masters.values())
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())

    def test_gradients_of_layers_that_stay_open_stay(self) -> None:
        _, masks = stack(4)
        schedule = LayerSchedule(masks, fraction=1.0, every=1, batches=[0], loss=no_loss)
        for blocks in masks.parameters():
            blocks.grad = torch.ones_like(blocks)
        schedule.step()
        assert all(blocks.grad is not None for blocks in masks.parameters())

    def test_an_edit_by_hand_is_followed_before(self) -> None:
        model, masks = stack(4)
        with torch.no_grad():
            for blocks in masks.parameters():
                blocks.add_(0.5)
        schedule = LayerSchedule(masks, every=1, batches=[0], loss=no_loss)
        schedule.step()
        model(torch.randn(2, 16))
        assert_invariant(model, masks)

    def test_an_unknown_base_is_refused(self) -> None:
        model, masks = stack(4)
        with torch.no_grad():
            for layer in model.layers:
                layer._parameters["weight"].mul_(2.0)
        schedule = LayerSchedule(masks, every=1, batches=[0], loss=no_loss)
        with pytest.raises(EmbedError, match="base is not known"):
            schedule.step()
        model(torch.randn(2, 16))
        assert_invariant(model, masks)


class TestResuming:
    def test_in_the_middle_equals_the_undisturbed_run(self) -> None:
        def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, LayerSchedule]:
            torch.manual_seed(0)
            model, masks = stack(6)
            batches = [torch.randn(3, 16) for _ in range(3)]
            optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
            return model, optimizer, LayerSchedule(masks, every=2, batches=iter_again(batches), loss=square, seed=seed)

        def run(parts: Any, steps: range) -> Iterator[Any]:
            model, optimizer, schedule = parts
            for step in steps:
                torch.manual_seed(step)
                square(model, torch.randn(8, 16)).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                yield schedule.drawn, schedule.report()

        undisturbed = build(3)
        expected = list(run(undisturbed, range(24)))
        first = build(3)
        found = list(run(first, range(11)))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = build(99)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        model, _, schedule = second
        assert schedule.drawn == first[2].drawn
        opened = [name for name, state in block_states(model).items() if state.blocks.requires_grad]
        assert [layer_of(name) for name in opened] == [*schedule.drawn, "head"]
        found += run(second, range(11, 24))
        assert found == expected
        assert any(row.score for row in expected[-1][1].layers)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed[0].parameters(), strict=True))

    def test_a_loaded_state_is_a_copy(self) -> None:
        _, masks = stack(4)
        shift(masks)
        schedule = LayerSchedule(masks, every=1, batches=[torch.randn(3, 16)], loss=fit, seed=4)
        schedule.step()
        state = schedule.state_dict()
        kept = copy.deepcopy(state)
        first = [schedule.report() for _ in range(5) if schedule.step() is None]
        assert len({row.score for report in first for row in report.layers}) > 5
        schedule.load_state_dict(state)
        assert [schedule.report() for _ in range(5) if schedule.step() is None] == first
        assert all(torch.equal(state[key], kept[key]) for key in ("scores", "generator"))
        assert {**state, "scores": 0, "generator": 0} == {**kept, "scores": 0, "generator": 0}

    def test_old_gradients_of_layers_that_are_closed_by_loading(self) -> None:
        model, masks = stack(4)
        states = [LayerSchedule(masks, "random", seed=seed).state_dict() for seed in range(10)]
        schedule = LayerSchedule(masks, "random")
        for state in states:
            square(model, torch.randn(2, 16)).backward()
            schedule.load_state_dict(state)
            assert trained_layers(masks) == schedule.drawn
            closed = [blocks for blocks in masks.parameters() if not blocks.requires_grad]
            assert len(closed) == 3 and all(blocks.grad is None for blocks in closed)

    def test_a_closed_schedule_stays_closed(self) -> None:
        _, masks = stack(4)
        schedule = LayerSchedule(masks, "random")
        schedule.close()
        other = LayerSchedule(masks, "random")
        other.load_state_dict(schedule.state_dict())
        other.step()
        assert len(trained_layers(masks)) == 4

    def test_states_that_do_not_fit_change_nothing(self) -> None:
        _, masks = stack(4)
        schedule = LayerSchedule(masks, "random", seed=1)
        before = schedule.state_dict()
        _model, others = stack(5)
        other = LayerSchedule(others, "random").state_dict()
        cases = [
            ({**before, "policy": "importance"}, r"policy 'importance' and 4 layers, this schedule of 'random' and 4"),
            (other, "5 layers"),
            ({}, "no state of a LayerSchedule .*'policy'"),
            ({**before, "generator": torch.zeros(3, dtype=torch.uint8)}, "no state of a LayerSchedule"),
        ]
        for state, message in cases:
            with pytest.raises(ArgumentError, match=message) as error:
                schedule.load_state_dict(state)
            assert "\n" not in str(error.value)
            after = schedule.state_dict()
            assert all(torch.equal(after[key], before[key]) for key in ("scores", "generator"))
            assert after["drawn"] == before["drawn"] and trained_layers(masks) == schedule.drawn


class iter_again:  # noqa: N801
    """A loader that is no list: it can be begun again, and has neither a length nor an index."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class TestLayers:
    @pytest.mark.parametrize(
        ("architecture", "prefix"),
        [("llama", "model.layers"), ("gpt2", "transformer.h"), ("roberta", "roberta.encoder.layer")],
    )
    def test_of_a_transformer(self, architecture: str, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
        case = tiny(architecture, layers=3)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        schedule = LayerSchedule(masks, "random")
        assert list(schedule.layers) == [f"{prefix}.{i}" for i in range(3)]
        assert [name for names in schedule.layers.values() for name in names] == list(masks)
        assert "other lists" not in caplog.text

    def test_of_two_stacks_are_those_with_more_weights(self, caplog: pytest.LogCaptureFixture) -> None:
        model = nn.ModuleDict({"a": stack(2)[0], "b": stack(3)[0]})
        sylva_compile.merge_and_unload(model)
        masks = random_masks(model, [n for n, _ in model.named_parameters() if "layers" in n], 8, 0.7)
        schedule = LayerSchedule(masks, "random")
        assert list(schedule.layers) == ["b.layers.0", "b.layers.1", "b.layers.2"]
        assert "2 masked weights lie in other lists of modules than 'b.layers', a.layers.0.weight first" in caplog.text

    def test_lists_within_lists_and_a_list_of_one(self) -> None:
        inner = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(11)]
        model = nn.Sequential(nn.ModuleDict({"layers": nn.ModuleList(inner)}))
        names = [f"0.layers.{i}.{j}.weight" for i in reversed(range(11)) for j in (0, 2)]
        schedule = LayerSchedule(random_masks(model, names, 8, 0.7), "random")
        assert list(schedule.layers) == [f"0.layers.{i}" for i in range(11)]
        assert schedule.layers["0.layers.3"] == ["0.layers.3.0.weight", "0.layers.3.2.weight"]

    def test_named_by_the_user(self) -> None:
        model, masks = stack(4)
        names = [f"layers.{i}.weight" for i in range(4)]
        schedule = LayerSchedule(masks, "random", fraction=0.5, layers=[names[:2], names[2:]])
        assert schedule.layers == {"0": names[:2], "1": names[2:]}
        assert trained_layers(masks) in (["layers.0", "layers.1"], ["layers.2", "layers.3"])
        schedule.close()
        schedule = LayerSchedule(masks, "random", fraction=0.5, layers={"low": names[:1], "top": [names[3]]})
        assert len(trained_layers(masks)) == 3
        assert schedule.drawn[0] in ("low", "top")
        schedule.close()
        # A head can be a layer, too.
        schedule = LayerSchedule(masks, "random", layers=(["head.weight"], names))
        flags = set()
        for _ in range(20):
            schedule.step()
            flags.add(block_states(model)["head.weight"].blocks.requires_grad)
        assert flags == {True, False}


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"policy": "best"}, "policy='best'; use 'importance' or 'random'"),
            ({"policy": "importance"}, "give batches=loader"),
            ({"fraction": 0.0}, "fraction=0.0"),
            ({"fraction": 1.5}, "fraction=1.5"),
            ({"every": 0}, "every=0"),
            ({"every": 2.5}, "every=2.5"),
            ({"suppress": 1.0}, "suppress=1.0"),
            ({"layers": [["layers.0.weight"]]}, "layers names 1 layer; a schedule draws from two or more"),
            ({"layers": [["layers.0.weight"], ["layers.9.weight"]]}, "no weight 'layers.9.weight'; name weights"),
            ({"layers": [["layers.0.weight"], []]}, "Layer '1' has no weights"),
            ({"layers": {"a": ["layers.0.weight"], "b": ["layers.0.weight"]}}, "in the layers 'a' and 'b'"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        _, masks = stack(4)
        with pytest.raises(ArgumentError, match=message) as error:
            LayerSchedule(masks, **({"policy": "random"} | options))
        assert "\n" not in str(error.value)
        assert len(trained_layers(masks)) == 4

    @pytest.mark.parametrize("names", [["embedding.weight", "head.weight"], ["embedding.weight", "layers.0.weight"]])
    def test_too_few_layers(self, names: list[str]) -> None:
        model = Stack(4)
        with pytest.raises(ArgumentError, match="No two masked weights lie in layers of one list; name layers by"):
            LayerSchedule(random_masks(model, names, 8, 0.7), "random")
        assert not block_states(model)

    def test_no_masks(self) -> None:
        with pytest.raises(ArgumentError, match="masks is a dict; give the Masks"):
            LayerSchedule({}, "random")  # type: ignore[arg-type]

    @pytest.mark.parametrize("batches", [[], iter([1])])
    def test_batches_that_end(self, batches: Any) -> None:
        _, masks = stack(4)
        schedule = LayerSchedule(masks, every=1, batches=batches, loss=no_loss)
        if batches != []:
            schedule.step()
        with pytest.raises(ArgumentError, match="batches is empty, or an iterator that has ended"):
            schedule.step()

    def test_a_batch_without_a_loss(self) -> None:
        _, masks = stack(4)
        schedule = LayerSchedule(masks, every=1, batches=[torch.zeros(2, 16)])
        with pytest.raises(TraceError, match="loss_fn"):
            schedule.step()


class TestReport:
    def test_prints_a_table(self) -> None:
        _, masks = stack(4)
        schedule = with_scores(LayerSchedule(masks, every=5, batches=[0], fraction=0.5), [1.25, 0.0, -2.0, 0.0])
        for _ in range(3):
            schedule.step()
        report = schedule.report()
        assert [row.name for row in report.layers if row.trained] == schedule.drawn
        assert sum(row.times_drawn for row in report.layers) == 8
        lines = str(report).splitlines()
        assert lines[0].split() == ["layer", "score", "drawn", "now"]
        first = report.layers[0]
        wanted = ["layers.0", "1.2500", str(first.times_drawn)] + ["trained"] * first.trained
        assert lines[1].split() == wanted
        assert lines[5:] == ["2 of 4 layers trained now."]

    def test_names_what_is_trained_below(self) -> None:
        case = tiny("llama", layers=3)
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        schedule = LayerSchedule(masks, "random")
        case.model.lm_head.requires_grad_(True)
        while schedule.drawn != ["model.layers.1"]:
            schedule.step()
        assert schedule.report().below == ()
        for layer in case.model.model.layers:
            layer.input_layernorm.requires_grad_(True)
        case.model.model.embed_tokens.requires_grad_(True)
        embedding, norm = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
        assert schedule.report().below == (embedding, norm)
        case.model.enable_input_require_grads()
        hooked = "LlamaForCausalLM.enable_input_require_grads()"
        assert schedule.report().below == (embedding, norm, hooked)
        text = f"The backward pass may go on below the lowest of them: {embedding}, {norm}, {hooked}."
        assert str(schedule.report()).splitlines()[-1] == text
        case.model.disable_input_require_grads()
        assert schedule.report().below == (embedding, norm)


class TestCompiledLayers:
    def test_lengths_vary(self) -> None:
        model = nn.Sequential(*(Layer() for _ in range(3))).requires_grad_(False)
        # As many blocks in each: Dynamo takes the number of blocks of a closed layer as fixed.
        maps = {f"{i}.linear.weight": torch.tensor([[True, i < 2], [i > 0, i != 1]]) for i in range(3)}
        masks = Masks.from_block_maps(model, maps, 8)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        for layer in model:
            layer.compile(backend=backend)
        batches = [torch.randn(length, 16) for length in (16, 12, 9, 14)]
        schedule = LayerSchedule(masks, fraction=0.67, every=3, batches=batches, loss=square)
        # Past the limit, Dynamo leaves layers uncompiled.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for step in range(24):
                square(model, batches[step % 4]).backward()
                schedule.step()
                model.zero_grad()
        assert backend.report().rewritten == len(masks)
        assert all(layer._compiled_call_impl is not None for layer in model)

    @pytest.mark.parametrize("policy", ["random", "importance"])
    def test_four_artifacts_serve_all_draws(self, policy: Any) -> None:
        case = tiny("llama", layers=6)
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        reference = copy.deepcopy(case.model)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        made = []

        def counting(*args: Any, **options: Any) -> Any:
            compiled = backend(*args, **options)
            made.append(compiled)
            return compiled

        for layer in case.model.model.layers:
            layer.compile(backend=counting)
        batches = [case.batch] if policy == "importance" else None
        schedule = LayerSchedule(masks, policy, fraction=0.34, every=4, batches=batches)
        states, twins = block_states(case.model), block_states(Masks(masks, model=reference).embed())
        drawn = set()
        for step in range(40):
            drawn.add(tuple(schedule.drawn))
            case.model(**case.batch).loss.backward()
            if step % 8 == 0:
                for name, state in states.items():
                    twins[name].blocks.requires_grad_(state.blocks.requires_grad)
                reference(**case.batch).loss.backward()
                for name, state in states.items():
                    if not state.blocks.requires_grad:
                        assert state.blocks.grad is None
                        continue
                    assert state.blocks.grad is not None
                    torch.testing.assert_close(state.blocks.grad, twins[name].blocks.grad)
            schedule.step()
            case.model.zero_grad()
            reference.zero_grad()
        assert len(drawn) > 8
        # Trained or frozen, with an input that needs a gradient or does not.
        assert len(made) == 4


RANK = """
import sys
sys.path[:0] = sys.argv[3:]
import torch
import two_ranks
from test_layers import LayerSchedule, block_states, layer_of, square, stack

rank = int(sys.argv[1])
with two_ranks.process_group(rank, sys.argv[2]) as group:
    torch.manual_seed(0)
    model, masks = stack(6)
    torch.manual_seed(rank)
    batches = [torch.randn(3, 16) for _ in range(3)]
    optimizer = torch.optim.AdamW(masks.parameters(), lr=1e-2)
    ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    schedule = LayerSchedule(masks, every=2, batches=batches, loss=square, process_group=group)
    for _ in range(12):
        before = {name: state.weight.clone() for name, state in block_states(model).items()}
        square(ddp, torch.randn(8, 16)).backward()
        optimizer.step()
        for name, state in block_states(model).items():
            trained = layer_of(name) in schedule.drawn or name == "head.weight"
            assert torch.equal(before[name], state.weight) != trained, name
        schedule.step()
        optimizer.zero_grad()
        print(schedule.drawn, [row.score for row in schedule.report().layers], model.head.weight.sum().item())
    assert len({row.score for row in schedule.report().layers}) > 3
    schedule.close()
    losses = iter([(0.0, 2.0), (1.0, 4.0)][rank])
    halves = [["layers.0.weight"], ["layers.1.weight"]]
    options = {"loss": lambda model, batch: torch.tensor(next(losses)), "layers": halves, "process_group": group}
    schedule = LayerSchedule(masks, every=1, batches=[0], **options)
    schedule.step()
    print(sorted(row.score for row in schedule.report().layers))
"""


def test_two_ranks_draw_the_same(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    here = Path(__file__).parent
    first, second = two_ranks.run(str(script), tmp_path / "store", here, here.parent / "support")
    assert first == second
    *lines, scores = first.splitlines()
    assert len(lines) == 12
    # Averaged over the ranks, the losses of the two actions are 0.5 and 3.
    reward = (math.exp(-0.5) - math.exp(-3.0)) / 2
    assert json.loads(scores) == pytest.approx([-2.5 * reward, 2.5 * reward])
