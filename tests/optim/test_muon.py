"""Muon steps every block as torch's Muon steps a matrix, and everything else that an optimizer here can do."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from newton_schulz import newton_schulz
from oracle import assert_invariant, random_masks
from torch import Tensor, nn

from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError, GradientError
from sylva_compile.kernels.step.cpu import CpuLaunch
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.optim import AdamW, Muon, launches


@pytest.fixture(autouse=True)
def exact_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's Muon multiply in the dtype of its parameters."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)


@pytest.fixture(params=[CpuLaunch, EagerLaunch], ids=["generated", "eager"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Step with the generated kernel and with torch's operations, the two launches of a CPU."""
    chosen: type = request.param
    if chosen is EagerLaunch:
        monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
    return chosen


class Weights(nn.Module):
    """A module with matrices as parameters and no layers."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for number, weight in enumerate(weights):
            self.register_parameter(f"w{number}", nn.Parameter(weight))


class Pair:
    """Blocks of dense weights with our optimizer, and each block's part inside its weight with torch's, in float64."""

    def __init__(self, groups: list[dict[str, Any]], block_size: int, seed: int = 0, **options: Any) -> None:
        """`groups` have lists of dense weights as `params`."""
        torch.manual_seed(seed)
        self.model = Weights([weight for group in groups for weight in group["params"]])
        self.masks = random_masks(self.model, [name for name, _ in self.model.named_parameters()], block_size, 0.5)
        self.masks.embed()
        self.states = list(block_states(self.model).values())
        self.matrices: list[list[nn.Parameter]] = [
            [nn.Parameter(part.double().clone()) for part in self._parts(number, state.blocks.detach())]
            for number, state in enumerate(self.states)
        ]
        ours, theirs = iter(self.states), iter(self.matrices)
        options = {"lr": 0.01, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | options
        self.optimizer = Muon(
            [{**group, "params": [next(ours).blocks for _ in group["params"]]} for group in groups], **options
        )
        twins = [{**group, "params": [one for _ in group["params"] for one in next(theirs)]} for group in groups]
        self.twin = torch.optim.Muon(twins, **options)

    def _parts(self, number: int, blocks: Tensor) -> list[Tensor]:
        mask = self.states[number].mask
        b, (m, n) = mask.block_size, mask.shape
        places = zip(mask.rows.tolist(), mask.cols.tolist(), blocks, strict=True)
        return [block[: min(b, m - row * b), : min(b, n - col * b)] for row, col, block in places]

    def gradients(self, missing: Callable[[int], bool] = lambda number: False, rank: int | None = None) -> None:
        for number, (state, matrices) in enumerate(zip(self.states, self.matrices, strict=True)):
            gradient = None if missing(number) else self._gradient(state.blocks, rank)
            state.blocks.grad = gradient
            parts = [None] * len(matrices) if gradient is None else self._parts(number, gradient)
            for matrix, part in zip(matrices, parts, strict=True):
                matrix.grad = None if part is None else part.double()

    def _gradient(self, blocks: Tensor, rank: int | None) -> Tensor:
        count, b, _ = blocks.shape
        if rank is None:
            return torch.randn(count, b, b).to(blocks)
        return (torch.randn(count, b, rank) @ torch.randn(count, rank, b)).to(blocks)

    def step(self) -> None:
        self.optimizer.step()
        self.twin.step()

    def compare(self, tolerance: float = 1e-5) -> None:
        assert_invariant(self.model, self.masks)
        for number, (state, matrices) in enumerate(zip(self.states, self.matrices, strict=True)):
            found = [(state.blocks.detach(), [one.detach() for one in matrices])]
            momenta = [self.twin.state[one].get("momentum_buffer") for one in matrices]
            if None not in momenta and momenta:
                found.append((self.optimizer.state[state.blocks]["momentum_buffer"], momenta))
            for mine, wanted in found:
                assert torch.equal(state.zero_outside(mine), mine)
                for part, exact in zip(self._parts(number, mine), wanted, strict=True):
                    error = float((part.double() - exact).abs().max())
                    assert error <= tolerance * max(1.0, float(exact.abs().max())), error


@st.composite
def journeys(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([8, 11, 16, 24, 32, 64, 128]))
    sizes = st.integers(max(1, block_size // 2), 3 * block_size)
    groups = draw(st.lists(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=2), min_size=1, max_size=2))
    return {
        "groups": groups,
        "block_size": block_size,
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "rates": draw(st.lists(st.floats(1e-4, 0.05), min_size=2, max_size=2)),
        "options": {
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "nesterov": draw(st.booleans()),
            "adjust_lr_fn": draw(st.sampled_from(["match_rms_adamw", "original"])),
        },
        "steps": draw(st.integers(1, 50 if block_size < 64 else 8)),
        "share_missing": draw(st.sampled_from([0.0, 0.3])),
        "schedule": draw(st.sampled_from([None, "exponential", "one cycle"])),
        "rank": draw(st.sampled_from([None, None, 1, 3])),
        "seed": draw(st.integers(0, 1000)),
    }


class TestTrajectory:
    @settings(max_examples=40, deadline=None)
    @given(journeys())
    def test_is_torchs_over_each_block(self, journey: dict[str, Any]) -> None:
        shapes, b = journey["groups"], journey["block_size"]
        if all(size < b for group in shapes for shape in group for size in shape):
            shapes[0].append((b, b))
        groups = [
            {"params": [torch.randn(shape).to(journey["dtype"]) for shape in group], "lr": rate}
            for group, rate in zip(shapes, journey["rates"], strict=False)
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
            pair = Pair(groups, b, journey["seed"], **journey["options"])
            schedulers = []
            for optimizer in (pair.optimizer, pair.twin):
                if journey["schedule"] == "exponential":
                    schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
                elif journey["schedule"] == "one cycle":
                    schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=60))
            for _ in range(journey["steps"]):
                drawn = torch.rand(len(pair.states))
                pair.gradients(
                    lambda number, drawn=drawn: float(drawn[number]) < journey["share_missing"], journey["rank"]
                )
                pair.step()
                for scheduler in schedulers:
                    scheduler.step()
            pair.compare()

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"nesterov": False, "momentum": 0.5},
            {"ns_steps": 1, "weight_decay": 0.1},
            {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8, "eps": 0.1},
            {"adjust_lr_fn": "original"},
        ],
        ids=lambda options: "-".join(options) or "plain",
    )
    def test_both_ways_to_step(self, launch: type, options: dict[str, Any]) -> None:
        pair = Pair([{"params": [torch.randn(40, 50), torch.randn(30, 45).t()]}], 16, **options)
        for _ in range(10):
            pair.gradients()
            pair.step()
        pair.compare()
        assert {type(one) for one in pair.optimizer._launches} == {launch}

    def test_float64(self, launch: type) -> None:
        pair = Pair([{"params": [torch.randn(40, 50, dtype=torch.float64)]}], 16)
        for _ in range(5):
            pair.gradients()
            pair.step()
        pair.compare(tolerance=1e-13)

    @pytest.mark.parametrize("block_size", [9, 17, 130, 200])
    def test_odd_block_sizes(self, launch: type, block_size: int) -> None:
        pair = Pair([{"params": [torch.randn(2 * block_size + 1, 3 * block_size)]}], block_size)
        for _ in range(3):
            pair.gradients()
            pair.step()
        pair.compare()

    def test_over_the_edge_nothing_is_trained(self, launch: type) -> None:
        # A backward pass gives zero gradients outside of the weight; these random gradients are not zero there.
        pair = Pair([{"params": [torch.randn(13, 203)]}], 16)
        for _ in range(2):
            pair.gradients()
            pair.step()
        pair.compare()

    def test_blocks_in_another_order_of_memory(self) -> None:
        torch.manual_seed(0)
        values, gradient = torch.randn(8, 8, 5), torch.randn(5, 8, 8)
        ends = []
        for blocks in (nn.Parameter(values.permute(2, 0, 1)), nn.Parameter(values.permute(2, 0, 1).contiguous())):
            optimizer = Muon([blocks], lr=0.1)
            for _ in range(2):
                blocks.grad = gradient
                optimizer.step()
            ends.append(blocks.detach().contiguous())
        torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)

    def test_values_beyond_the_edge_are_left_alone(self, launch: type) -> None:
        pair = Pair([{"params": [torch.randn(13, 16)]}], 8)
        (state,) = pair.states
        outside = state.zero_outside(torch.ones_like(state.blocks)) == 0
        with torch.no_grad():
            state.blocks[outside] = 100.0
        pair.gradients()
        pair.step()
        assert bool((state.blocks[outside] == 100.0).all())
        with torch.no_grad():
            state.blocks[outside] = 0.0
        pair.compare()

    @pytest.mark.parametrize("limit", [None, 1.0])
    def test_no_blocks(self, launch: type, limit: float | None) -> None:
        blocks = nn.Parameter(torch.zeros(0, 8, 8))
        blocks.grad = torch.zeros(0, 8, 8)
        Muon([blocks], max_grad_norm=limit).step()

    def test_a_zero_gradient_moves_nothing(self, launch: type) -> None:
        pair = Pair([{"params": [torch.randn(32, 32)]}], 16)
        before = pair.model.w0.detach().clone()
        pair.states[0].blocks.grad = torch.zeros_like(pair.states[0].blocks)
        pair.optimizer.step()
        assert torch.equal(pair.model.w0, before)

    def test_the_result_does_not_depend_on_threads(self) -> None:
        ends = []
        for threads in (1, 2, 3):
            kept = torch.get_num_threads()
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            pair = Pair([{"params": [torch.randn(200, 200)]}], 32)
            pair.gradients()
            pair.optimizer.step()
            torch.set_num_threads(kept)
            ends.append(pair.model.w0.detach().clone())
        assert torch.equal(ends[0], ends[1])
        assert torch.equal(ends[0], ends[2])

    def test_blocks_of_several_sizes_in_one_launch(self) -> None:
        pairs = [Pair([{"params": [torch.randn(70, 50)]}], size) for size in (8, 16, 33)]
        optimizer = Muon([state.blocks for pair in pairs for state in pair.states], lr=0.01)
        for _ in range(3):
            for pair in pairs:
                pair.gradients()
                pair.twin.step()
            optimizer.step()
        for pair in pairs:
            pair.optimizer = optimizer
            pair.compare()
        assert len(list(optimizer._launches)) == 1


class TestOtherParameters:
    def test_step_by_the_rule_of_their_group(self, launch: type) -> None:
        pair = Pair([{"params": [torch.randn(40, 50)]}], 16)
        bias, other = nn.Parameter(torch.randn(70)), nn.Parameter(torch.randn(5, 3))
        twins = [nn.Parameter(one.detach().clone()) for one in (bias, other)]
        optimizer = Muon(
            [
                {"params": pair.masks.parameters()},
                {"params": [bias], "rule": "adamw", "lr": 0.1, "betas": (0.8, 0.9)},
                {"params": [other], "rule": "sgd", "momentum": 0.5},
            ],
            lr=0.01,
        )
        exact = [torch.optim.AdamW(twins[:1], lr=0.1, betas=(0.8, 0.9), weight_decay=0.0)]
        exact.append(torch.optim.SGD(twins[1:], lr=0.01, momentum=0.5))
        for _ in range(4):
            pair.gradients()
            for mine, twin in zip((bias, other), twins, strict=True):
                mine.grad = twin.grad = torch.randn_like(mine)
            optimizer.step()
            pair.twin.step()
            for one in exact:
                one.step()
        pair.optimizer = optimizer
        pair.compare()
        torch.testing.assert_close([bias, other], twins)
        assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}

    def test_a_group_has_the_options_of_its_rule_alone(self) -> None:
        bias, late = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        optimizer = Muon([{"params": [bias], "rule": "adamw"}], lr=0.25)
        optimizer.add_param_group({"params": [late], "rule": "lion", "lr": 0.5})
        first, second = optimizer.param_groups
        assert (first["lr"], first["eps"], first["weight_decay"]) == (0.25, 1e-8, 0.0)
        assert (second["lr"], second["betas"]) == (0.5, (0.9, 0.99))
        assert not {"ns_steps", "momentum"} & (set(first) | set(second))

    def test_a_clipped_norm_is_that_of_all(self) -> None:
        blocks, bias = nn.Parameter(torch.zeros(4, 8, 8)), nn.Parameter(torch.zeros(5))
        optimizer = Muon([{"params": [blocks]}, {"params": [bias], "rule": "sgd", "lr": 1.0}], max_grad_norm=1.0)
        blocks.grad, bias.grad = torch.randn(4, 8, 8), torch.randn(5)
        norm = math.sqrt(float(blocks.grad.square().sum() + bias.grad.square().sum()))
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert float(optimizer.grad_norm) == pytest.approx(norm)
        torch.testing.assert_close(bias.detach(), -bias.grad / norm)

    def made(self, **options: Any) -> tuple[nn.Parameter, nn.Parameter, Muon]:
        torch.manual_seed(0)
        blocks, bias = nn.Parameter(torch.randn(4, 8, 8)), nn.Parameter(torch.randn(5))
        return blocks, bias, Muon([{"params": [blocks]}, {"params": [bias], "rule": "adamw"}], lr=0.01, **options)

    @pytest.mark.parametrize("how", ["state dict", "pickle", "deepcopy"])
    def test_go_on_from_a_copy(self, how: str) -> None:
        blocks, bias, optimizer = self.made()
        blocks.grad, bias.grad = torch.randn_like(blocks), torch.randn_like(bias)
        optimizer.step()
        if how == "state dict":
            *own, twin = self.made()
            for mine, theirs in zip(own, (blocks, bias), strict=True):
                mine.data.copy_(theirs.data)
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            twin = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
            own = [parameter for group in twin.param_groups for parameter in group["params"]]
        for mine, theirs in zip(own, (blocks, bias), strict=True):
            mine.grad = torch.ones_like(mine)
            theirs.grad = torch.ones_like(theirs)
        optimizer.step()
        twin.step()
        assert torch.equal(own[0], blocks)
        assert torch.equal(own[1], bias)

    def test_a_checkpoint_of_adamw_is_taken_over(self) -> None:
        blocks, bias, optimizer = self.made()
        other = AdamW([{"params": [blocks]}, {"params": [bias]}], lr=0.5)
        blocks.grad, bias.grad = torch.randn_like(blocks), torch.randn_like(bias)
        saved = other.state_dict()
        for group in saved["param_groups"]:
            del group["maximize"]
        saved["param_groups"][1]["rule"] = "adamw"
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["rule"] == "muon"
        assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer.step()
        assert set(optimizer.state[blocks]) == {"momentum_buffer"}

    def test_without_momentum_blocks_have_no_state(self) -> None:
        blocks = nn.Parameter(torch.randn(3, 16, 16))
        twins = [nn.Parameter(block.detach().double()) for block in blocks]
        optimizer = Muon([blocks], lr=0.1, momentum=0.0)
        twin = torch.optim.Muon(twins, lr=0.1, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            blocks.grad = torch.randn_like(blocks)
            for one, gradient in zip(twins, blocks.grad, strict=True):
                one.grad = gradient.double()
            optimizer.step()
            twin.step()
        assert not optimizer.state
        torch.testing.assert_close(blocks.detach().double(), torch.stack(twins).detach(), rtol=0.0, atol=2e-2)

    def test_one_cycle_changes_what_each_rule_has(self) -> None:
        blocks, bias, optimizer = self.made()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        for _ in range(5):
            blocks.grad, bias.grad = torch.randn_like(blocks), torch.randn_like(bias)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["momentum"] < 0.95
        assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)

    def test_grad_scaler(self) -> None:
        blocks, bias, optimizer = self.made()
        wanted_blocks, wanted_bias, plain = self.made()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scale = scaler.scale(torch.ones(()))
        for values, parameters in ((scale, (blocks, bias)), (torch.ones(()), (wanted_blocks, wanted_bias))):
            torch.manual_seed(1)
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter) * values
        scaler.step(optimizer)
        plain.step()
        torch.testing.assert_close([blocks, bias], [wanted_blocks, wanted_bias])

    def test_a_group_may_come_late(self) -> None:
        blocks, _, optimizer = self.made()
        blocks.grad = torch.randn_like(blocks)
        optimizer.step()
        late = nn.Parameter(torch.zeros(2, 16, 16))
        late.grad = torch.randn_like(late)
        optimizer.add_param_group({"params": [late], "lr": 0.5, "ns_steps": 3})
        before = blocks.detach().clone()
        optimizer.step()
        assert not torch.equal(blocks, before)
        assert late.any()


class TestIsAnOptimizer:
    def run(self, steps: int, **options: Any) -> tuple[Pair, Muon]:
        torch.manual_seed(0)
        pair = Pair([{"params": [torch.randn(40, 50), torch.randn(20, 33)]}], 8)
        optimizer = Muon(pair.masks.parameters(), lr=0.01, **options)
        for _ in range(steps):
            pair.gradients()
            for state in pair.states:
                state.blocks.grad = state.zero_outside(state.blocks.grad)
            optimizer.step()
        return pair, optimizer

    def test_clipping_does_not_change_the_direction(self, launch: type) -> None:
        # The momentum's size does not matter to Muon, so clipping equal gradients changes the momentum alone.
        kept, clipped = (self.run(1, max_grad_norm=limit) for limit in (None, 0.1))
        for one, other in zip(kept[0].states, clipped[0].states, strict=True):
            torch.testing.assert_close(one.blocks, other.blocks, rtol=1e-5, atol=1e-6)
            large, small = (
                run[1].state[state.blocks]["momentum_buffer"] for run, state in ((kept, one), (clipped, other))
            )
            assert float(small.norm()) < 0.1 * float(large.norm())
        assert clipped[1].grad_norm is not None
        gradients = [state.blocks.grad for state in clipped[0].states]
        assert float(clipped[1].grad_norm) == pytest.approx(float(nn.utils.get_total_norm(gradients)), rel=1e-5)

    @pytest.mark.parametrize("answer", ["skip", "raise"])
    def test_nonfinite_gradients(self, launch: type, answer: Any) -> None:
        pair, optimizer = self.run(2, nonfinite=answer)
        pair.gradients()
        pair.states[1].blocks.grad[0, 0, 0] = torch.inf
        before = copy.deepcopy([state.blocks for state in pair.states]), copy.deepcopy(optimizer.state_dict()["state"])
        if answer == "raise":
            with pytest.raises(GradientError, match="w1_blocks"):
                optimizer.step()
        else:
            optimizer.step()
        after = [state.blocks for state in pair.states], optimizer.state_dict()["state"]
        torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
        assert_invariant(pair.model, pair.masks)

    @pytest.mark.parametrize("how", ["state dict", "pickle", "deepcopy"])
    def test_goes_on_from_a_copy(self, launch: type, how: str) -> None:
        pair, optimizer = self.run(3)
        other, _ = self.run(0)
        for state, source in zip(other.states, pair.states, strict=True):
            with torch.no_grad():
                state.blocks.copy_(source.blocks)
        if how == "state dict":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            resumed = Muon(other.masks.parameters(), lr=5.0)
            resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        elif how == "pickle":
            resumed = pickle.loads(pickle.dumps(optimizer))
            for mine, theirs in zip(resumed.param_groups[0]["params"], other.states, strict=True):
                resumed.state[theirs.blocks] = resumed.state.pop(mine)
            resumed.param_groups[0]["params"] = other.masks.parameters()
        else:
            model, resumed = copy.deepcopy((pair.model, optimizer))
            other = pair.__class__.__new__(pair.__class__)
            other.states, other.matrices = list(block_states(model).values()), [[] for _ in pair.states]
            other.masks, other.model = Masks(pair.masks, model=model), model
        torch.manual_seed(5)
        for run, one in ((pair, optimizer), (other, resumed)):
            torch.manual_seed(5)
            for state in run.states:
                state.blocks.grad = torch.randn_like(state.blocks)
            one.step()
        for state, source in zip(other.states, pair.states, strict=True):
            assert torch.equal(state.blocks, source.blocks)
        assert_invariant(other.model, other.masks)

    def test_bfloat16_states_are_drawn_alike_by_both_launches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, generated = self.run(1, state_dtype=torch.bfloat16, seed=3)
        monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
        _, eager = self.run(1, state_dtype=torch.bfloat16, seed=3)
        for mine, other in zip(generated.state.values(), eager.state.values(), strict=True):
            assert mine["momentum_buffer"].dtype == torch.bfloat16
            assert float((mine["momentum_buffer"] == other["momentum_buffer"]).float().mean()) > 0.999

    def test_one_moment_is_half_of_adamws_memory(self) -> None:
        def size(optimizer: torch.optim.Optimizer) -> int:
            return sum(value.nbytes for state in optimizer.state.values() for value in state.values())

        pair, optimizer = self.run(1)
        adamw = AdamW(pair.masks.parameters())
        adamw.step()
        assert 2 * size(optimizer) <= size(adamw)

    @pytest.mark.parametrize("weights", [7, 224])
    def test_one_call_a_step(self, weights: int) -> None:
        parameters = [nn.Parameter(torch.randn(index % 3 + 1, 8, 8)) for index in range(weights)]
        optimizer = Muon(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                optimizer.step()
            counts = {event.key: event.count for event in profile.key_averages()}
            assert counts["sylva_compile::step(Muon)"] == 1
            assert not any("foreach" in key or key in ("aten::bmm", "aten::mul_", "aten::copy_") for key in counts)

    def test_source_can_be_had(self) -> None:
        parameters = [
            {"params": [nn.Parameter(torch.ones(1, 8, 8))]},
            {"params": [nn.Parameter(torch.ones(3))], "rule": "adamw"},
        ]
        source = Muon(parameters).kernel_source()
        assert "multiply_symmetric<T, true>" in source
        assert "exp_avg_sq" in source

    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launches, "CpuLaunch", _no_compiler)
        pair = Pair([{"params": [torch.randn(40, 50)]}], 16)
        pair.gradients()
        pair.step()
        pair.compare()

    def test_blocks_that_no_longer_lie_dense(self) -> None:
        pair = Pair([{"params": [torch.randn(40, 50)]}], 16)
        blocks = pair.states[0].blocks
        values = blocks.detach().clone()
        blocks.data = torch.stack([values, values], dim=1)[:, 0]
        assert not blocks.is_contiguous()
        pair.gradients()
        pair.step()
        pair.compare()


def _no_compiler(*_: Any, **__: Any) -> None:
    raise launches.NativeCompilerError("no compiler here")


class TestRefusals:
    @pytest.mark.parametrize("shape", [(3,), (8, 8), (2, 8, 4), (1, 2, 8, 8)])
    def test_parameters_that_are_no_blocks(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ArgumentError, match="'rule': 'adamw'"):
            Muon([nn.Parameter(torch.zeros(shape))])

    def test_a_refused_group_is_not_added(self) -> None:
        optimizer = Muon([nn.Parameter(torch.zeros(1, 8, 8))])
        for group in (
            {"params": [nn.Parameter(torch.zeros(3))]},
            {"params": [nn.Parameter(torch.zeros(3))], "rule": "x"},
        ):
            with pytest.raises(ArgumentError):
                optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert optimizer.defaults["ns_steps"] == 5

    def test_a_rule_that_was_changed_later(self) -> None:
        bias = nn.Parameter(torch.zeros(3))
        bias.grad = torch.ones(3)
        optimizer = Muon([{"params": [bias], "rule": "adamw"}])
        optimizer.param_groups[0].update(Muon([nn.Parameter(torch.zeros(1, 8, 8))]).param_groups[0], params=[bias])
        with pytest.raises(ArgumentError, match="square blocks"):
            optimizer.step()
        assert not bias.any()

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"weight_decay": -0.1},
            {"momentum": 1.0},
            {"ns_steps": 0},
            {"ns_coefficients": (1.0, 2.0)},
            {"eps": math.nan},
            {"eps": 0.0},
            {"lr": math.inf},
            {"ns_steps": 2.5},
            {"ns_coefficients": (1.0, 2.0, math.nan)},
            {"adjust_lr_fn": "twice"},
            {"products": "float16"},
            {"betas": (0.9, 0.99)},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match=next(iter(options))):
            Muon([nn.Parameter(torch.zeros(1, 8, 8))], **options)

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ({"rule": "adamw", "ns_steps": 3}, "ns_steps"),
            ({"rule": "adamw", "betas": (2.0, 0.9)}, "beta"),
            ({"rule": "adamw", "lr": -1.0}, "learning rate"),
            ({"rule": "sgd", "nesterov": True}, "Nesterov"),
            ({"rule": "rprop"}, "'lion'"),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
    )
    def test_options_of_other_rules(self, group: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            Muon([{"params": [nn.Parameter(torch.zeros(3))], **group}])

    @pytest.mark.parametrize("change", [{"adjust_lr_fn": "twice"}, {"ns_steps": 0}, {"rule": "x"}])
    def test_options_that_were_changed_later(self, change: dict[str, Any]) -> None:
        blocks = nn.Parameter(torch.zeros(1, 8, 8))
        blocks.grad = torch.ones(1, 8, 8)
        optimizer = Muon([blocks])
        optimizer.param_groups[0].update(change)
        with pytest.raises(ArgumentError, match=next(iter(change))):
            optimizer.step()
        assert not blocks.any()
