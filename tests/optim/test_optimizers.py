"""Each optimizer follows the path of torch's optimizer of the same name, with schedules, clipping and checkpoints."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from sylva_compile.errors import ArgumentError, GradientError
from sylva_compile.kernels.build import native
from sylva_compile.kernels.step.cpu import CpuLaunch
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.optim import SGD, Adam, AdamW, GeneratedOptimizer, Lion, RMSprop, launches, rules

TWINS: dict[type[GeneratedOptimizer], type[torch.optim.Optimizer]] = {
    AdamW: torch.optim.AdamW,
    Adam: torch.optim.Adam,
    SGD: torch.optim.SGD,
    RMSprop: torch.optim.RMSprop,
}
CASES = [
    (AdamW, {"weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.0, "amsgrad": True, "betas": (0.8, 0.95)}),
    (Adam, {"weight_decay": 0.1, "maximize": True}),
    (Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-4}),
    (SGD, {}),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "dampening": 0.4}),
    (SGD, {"momentum": 0.5, "nesterov": True, "maximize": True}),
    (RMSprop, {"weight_decay": 0.1}),
    (RMSprop, {"momentum": 0.9, "centered": True, "alpha": 0.9}),
]
cases = pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda v: v.__name__ if isinstance(v, type) else None)


@pytest.fixture(params=[CpuLaunch, EagerLaunch], ids=["generated", "eager"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Step with the generated kernel and with torch's operations, the two launches of a CPU."""
    chosen: type = request.param
    if chosen is EagerLaunch:
        monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
    return chosen


class Pair:
    """Two copies of the same parameters: one with our optimizer, one with torch's."""

    def __init__(
        self, kind: type[GeneratedOptimizer], groups: list[dict[str, Any]], seed: int = 0, **options: Any
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.ours = self._make(groups)
        self.theirs = [nn.Parameter(p.detach().clone()) for p in self.ours]
        own, rest = iter(self.ours), iter(self.theirs)
        self.optimizer = kind(self._fill(groups, own), lr=0.01, **options)
        self.twin = TWINS[kind](self._fill(groups, rest), lr=0.01, **options)
        self.largest: dict[tuple[int, str], float] = {}

    def _make(self, groups: list[dict[str, Any]]) -> list[nn.Parameter]:
        shapes = [shape for group in groups for shape in group["params"]]
        return [nn.Parameter(torch.randn(shape, generator=self.random)) for shape in shapes]

    def _fill(self, groups: list[dict[str, Any]], parameters: Iterator[nn.Parameter]) -> list[dict[str, Any]]:
        return [{**group, "params": [next(parameters) for _ in group["params"]]} for group in groups]

    def gradients(self, missing: Callable[[int], bool] = lambda index: False, size: float = 1.0) -> None:
        for index, (mine, other) in enumerate(zip(self.ours, self.theirs, strict=True)):
            value = size * torch.randn(mine.shape, generator=self.random)
            mine.grad, other.grad = (None, None) if missing(index) else (value, value.clone())

    def step(self) -> None:
        self.optimizer.step()
        self.twin.step()
        self.compare()

    def compare(self, tolerance: float = 1e-6) -> None:
        for index, (mine, other) in enumerate(zip(self.ours, self.theirs, strict=True)):
            self._compare(index, "parameter", mine.detach(), other.detach(), tolerance)
            for name, value in self.twin.state[other].items():
                # torch's SGD counts no steps: it keeps the count of the checkpoint of ours that it loaded.
                if value is not None and not (name == "step" and isinstance(self.twin, torch.optim.SGD)):
                    self._compare(index, name, self.optimizer.state[mine][name], value, tolerance)

    def _compare(self, index: int, name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        # Sums cancel, so errors are relative to the largest value so far, not the current one; gradients are about one.
        self.largest[index, name] = max(self.largest.get((index, name), 1.0), float(wanted.abs().max()))
        close(found, wanted, tolerance, self.largest[index, name])


def close(found: Tensor, wanted: Tensor, tolerance: float, scale: float) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale)


@st.composite
def journeys(draw: st.DrawFn) -> dict[str, Any]:
    shape = st.lists(st.integers(1, 70), max_size=3).map(tuple)
    many = st.integers(3000, 9000).map(lambda size: (size,))
    groups = draw(st.lists(st.lists(shape | many, min_size=1, max_size=3), min_size=1, max_size=3))
    return {
        "case": draw(st.sampled_from(CASES)),
        "groups": [
            {"params": shapes, "lr": draw(st.floats(1e-4, 0.1)), "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
            for shapes in groups
        ],
        "steps": draw(st.integers(1, 50)),
        "seed": draw(st.integers(0, 1000)),
        "share_missing": draw(st.sampled_from([0.0, 0.3])),
        "schedule": draw(st.sampled_from([None, "exponential", "one cycle"])),
    }


class TestTrajectory:
    @settings(max_examples=40, deadline=None)
    @given(journeys())
    def test_is_torchs(self, journey: dict[str, Any]) -> None:
        kind, options = journey["case"]
        options = {name: value for name, value in options.items() if name != "weight_decay"}
        if kind is not SGD:
            # Where g + weight_decay * p cancels, a small eps would divide rounding errors by almost zero.
            options["eps"] = 0.01
        pair = Pair(kind, journey["groups"], journey["seed"], **options)
        schedulers = []
        for optimizer in (pair.optimizer, pair.twin):
            if journey["schedule"] == "exponential":
                schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
            elif journey["schedule"] == "one cycle" and kind is not RMSprop:
                # It also changes the momentum at every step.
                schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=60))
        for _ in range(journey["steps"]):
            drawn = torch.rand(len(pair.ours), generator=pair.random)
            pair.gradients(lambda index, drawn=drawn: float(drawn[index]) < journey["share_missing"])
            pair.step()
            for scheduler in schedulers:
                scheduler.step()

    @cases
    def test_both_ways_to_step(self, launch: type, kind: type[GeneratedOptimizer], options: dict[str, Any]) -> None:
        pair = Pair(kind, [{"params": [(37, 5), (5000,), ()]}], **options)
        for _ in range(10):
            pair.gradients()
            pair.step()
        assert {type(one) for one in pair.optimizer._launches} == {launch}

    @cases
    def test_float64(self, kind: type[GeneratedOptimizer], options: dict[str, Any]) -> None:
        torch.manual_seed(1)
        mine = nn.Parameter(torch.randn(3000, dtype=torch.float64))
        other = nn.Parameter(mine.detach().clone())
        optimizer, twin = kind([mine], lr=0.01, **options), TWINS[kind]([other], lr=0.01, **options)
        for _ in range(10):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
            optimizer.step()
            twin.step()
        close(mine.detach(), other.detach(), 1e-13, 1.0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_parameters_are_stepped_in_float32(self, dtype: torch.dtype, launch: type) -> None:
        wide = torch.randn(500).to(dtype).float()
        mine, other = nn.Parameter(wide.to(dtype)), nn.Parameter(wide.clone())
        mine.grad = torch.randn(500).to(dtype)
        other.grad = mine.grad.float()
        AdamW([mine], lr=0.1).step()
        torch.optim.AdamW([other], lr=0.1, weight_decay=0.0).step()
        assert torch.equal(mine.detach(), other.detach().to(dtype))

    def test_lion_is_its_papers(self, launch: type) -> None:
        p, m = torch.randn(5000), torch.zeros(5000)
        mine = nn.Parameter(p.clone())
        optimizer = Lion([mine], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
        for _ in range(20):
            g = torch.randn(5000)
            mine.grad = g.clone()
            optimizer.step()
            update = (0.9 * m + 0.1 * g).sign()
            p = p - 0.01 * (update + 0.1 * p)
            m = 0.98 * m + 0.02 * g
            close(mine.detach(), p, 1e-6, 1.0)
            close(optimizer.state[mine]["exp_avg"], m, 1e-6, 1.0)

    def test_layouts_dtypes_and_empty_parameters_in_one_step(self) -> None:
        def make() -> list[nn.Parameter]:
            torch.manual_seed(3)
            tensors = [
                torch.randn(30, 40).t(),
                torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                torch.randn(60, 80)[::2, ::4],
                torch.randn(0, 4),
                torch.randn(8, dtype=torch.float64),
                torch.randn(1),
            ]
            return [nn.Parameter(tensor) for tensor in tensors]

        ours, theirs = make(), make()
        optimizer, twin = AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0)
        for _ in range(5):
            for mine, other in zip(ours, theirs, strict=True):
                # A gradient need not have the strides of its parameter.
                mine.grad = torch.randn(mine.shape, dtype=mine.dtype).contiguous()
                other.grad = mine.grad.clone()
            ours[5].grad = theirs[5].grad = torch.ones(()).expand(1)
            optimizer.step()
            twin.step()
        for mine, other in zip(ours, theirs, strict=True):
            close(mine.detach(), other.detach(), 1e-6, 1.0)
            assert float(optimizer.state[mine]["step"]) == 5.0

    def test_learning_rate_in_a_tensor_and_momentum_by_group(self) -> None:
        pair = Pair(SGD, [{"params": [(50,)], "momentum": 0.9}, {"params": [(50,)], "momentum": 0.0}])
        for optimizer in (pair.optimizer, pair.twin):
            optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
        for _ in range(3):
            pair.gradients()
            pair.step()
            for optimizer in (pair.optimizer, pair.twin):
                optimizer.param_groups[0]["lr"].mul_(0.5)

    def test_a_group_that_comes_later_and_a_closure(self) -> None:
        pair = Pair(AdamW, [{"params": [(50,), (7, 3)]}], weight_decay=0.1)
        pair.gradients()
        pair.step()
        new = torch.randn(9)
        for optimizer, parameters in ((pair.optimizer, pair.ours), (pair.twin, pair.theirs)):
            parameters.append(nn.Parameter(new.clone()))
            optimizer.add_param_group({"params": [parameters[-1]], "lr": 0.1})

            def closure(optimizer: Any = optimizer, parameters: list[nn.Parameter] = parameters) -> Tensor:
                optimizer.zero_grad()
                loss = sum((p**2).sum() for p in parameters)
                assert isinstance(loss, Tensor)
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
        pair.compare()

    def test_data_of_a_parameter_replaced(self) -> None:
        pair = Pair(AdamW, [{"params": [(50, 4)]}], weight_decay=0.1)
        pair.gradients()
        pair.step()
        for parameter in (pair.ours[0], pair.theirs[0]):
            parameter.data = parameter.data.clone()
        pair.gradients()
        pair.step()


class TestCheckpoints:
    @cases
    def test_to_torch_and_back(self, kind: type[GeneratedOptimizer], options: dict[str, Any]) -> None:
        pair = Pair(kind, [{"params": [(40, 3)]}, {"params": [(7,)], "lr": 0.1}], **options)
        for turn in range(6):
            pair.gradients()
            pair.step()
            mine, theirs = saved(pair.optimizer), saved(pair.twin)
            assert mine["param_groups"] == theirs["param_groups"]
            if turn % 2:
                pair.optimizer.load_state_dict(mine)
                pair.twin.load_state_dict(theirs)
            else:
                pair.optimizer.load_state_dict(theirs)
                pair.twin.load_state_dict(mine)

    def test_pickle_and_deepcopy_keep_options_and_go_on_alone(self) -> None:
        parameter = nn.Parameter(torch.randn(30))
        parameter.grad = torch.randn(30)
        optimizer = AdamW([parameter], lr=0.1, max_grad_norm=0.5, state_dtype=torch.bfloat16)
        optimizer.step()
        value = parameter.detach().clone()
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert twin.options == optimizer.options
            own = twin.param_groups[0]["params"][0]
            own.grad = torch.randn(30)
            twin.step()
            assert not torch.equal(own, value)
        assert torch.equal(parameter, value)

    def test_states_of_another_shape_are_refused(self) -> None:
        parameter = nn.Parameter(torch.randn(30))
        optimizer = AdamW([parameter])
        optimizer.state[parameter]["exp_avg"] = torch.zeros(1)
        parameter.grad = torch.ones(30)
        with pytest.raises(ArgumentError, match="exp_avg"):
            optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


class TestClippingAndScaling:
    @pytest.mark.parametrize("limit", [0.1, 1e6])
    def test_is_clip_grad_norm(self, limit: float, launch: type) -> None:
        pair = Pair(SGD, [{"params": [(70, 80), (5,)]}, {"params": [(9000,)]}], momentum=0.9)
        pair.optimizer = SGD(
            [{"params": pair.ours[:2]}, {"params": pair.ours[2:]}], 0.01, momentum=0.9, max_grad_norm=limit
        )
        for _ in range(4):
            pair.gradients()
            kept = [parameter.grad.clone() for parameter in pair.ours]
            norm = nn.utils.clip_grad_norm_(pair.theirs, limit)
            pair.step()
            assert all(torch.equal(p.grad, grad) for p, grad in zip(pair.ours, kept, strict=True))
            torch.testing.assert_close(pair.optimizer.grad_norm.float(), norm, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("unscale_first", [False, True])
    def test_grad_scaler(self, unscale_first: bool) -> None:
        pair = Pair(AdamW, [{"params": [(50, 3), (5,)]}], weight_decay=0.1)
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
        for turn in range(6):
            pair.gradients()
            if turn == 3:
                pair.ours[0].grad[1, 1] = pair.theirs[0].grad[1, 1] = torch.inf
            for scaler, optimizer, parameters in zip(
                scalers, (pair.optimizer, pair.twin), (pair.ours, pair.theirs), strict=True
            ):
                for parameter in parameters:
                    parameter.grad = scaler.scale(parameter.grad)
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            pair.compare()
        assert scalers[0].get_scale() == scalers[1].get_scale()

    def test_a_first_step_that_is_skipped_leaves_no_state(self) -> None:
        parameter = nn.Parameter(torch.ones(4))
        parameter.grad = torch.full((4,), torch.inf)
        optimizer = SGD([parameter], momentum=0.9, nonfinite="skip")
        optimizer.step()
        assert not optimizer.state_dict()["state"]
        optimizer = AdamW([parameter], nonfinite="raise")
        with pytest.raises(GradientError, match="parameter 0 of group 0"):
            optimizer.step()
        assert not optimizer.state_dict()["state"]


class TestNonFinite:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
    def test_skip_and_raise_change_nothing(self, bad: float, options: dict[str, Any], launch: type) -> None:
        for answer in ("skip", "raise"):
            named = {"first": nn.Parameter(torch.randn(5000)), "second": nn.Parameter(torch.randn(4, 4))}
            optimizer = AdamW(named.items(), nonfinite=answer, **options)
            for parameter in named.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            before = copy.deepcopy([list(named.values()), optimizer.state_dict()["state"]])
            named["second"].grad[3, 2] = bad
            if answer == "raise":
                with pytest.raises(GradientError, match="second"):
                    optimizer.step()
            else:
                optimizer.step()
            after = [list(named.values()), optimizer.state_dict()["state"]]
            torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
            named["second"].grad[3, 2] = 1.0
            optimizer.step()
            assert float(optimizer.state[named["first"]]["step"]) == 2.0

    def test_ignored_as_torch_does(self) -> None:
        pair = Pair(AdamW, [{"params": [(5,), (5,)]}], amsgrad=True, weight_decay=0.1)
        pair.gradients()
        pair.ours[0].grad[2] = pair.theirs[0].grad[2] = torch.nan
        for _ in range(2):
            pair.optimizer.step()
            pair.twin.step()
        for mine, other in zip(pair.ours, pair.theirs, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)
            assert torch.isnan(mine).sum() == torch.isnan(other).sum()


class TestLowPrecisionStates:
    def run(self, threads: int, seed: int = 0, steps: int = 5, kind: Any = AdamW) -> tuple[Tensor, dict[str, Tensor]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(5)
            parameter = nn.Parameter(torch.randn(3, 9000))
            optimizer = kind([parameter], state_dtype=torch.bfloat16, seed=seed)
            for _ in range(steps):
                parameter.grad = torch.randn(3, 9000)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return parameter.detach(), dict(optimizer.state[parameter])

    def test_the_same_on_any_number_of_threads_and_in_the_twin(self, launch: type) -> None:
        wanted, states = self.run(1)
        assert states["exp_avg"].dtype == torch.bfloat16
        for threads in (2, 3):
            found, other = self.run(threads)
            assert torch.equal(found, wanted)
            assert torch.equal(other["exp_avg_sq"], states["exp_avg_sq"])

    def test_the_twin_draws_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, generated = self.run(1, steps=1, kind=Lion)
        monkeypatch.setattr(launches, "CpuLaunch", EagerLaunch)
        _, eager = self.run(1, steps=1, kind=Lion)
        assert (generated["exp_avg"] == eager["exp_avg"]).float().mean() > 0.9999

    def test_another_seed_is_another_draw(self) -> None:
        assert not torch.equal(self.run(1, seed=1)[1]["exp_avg"], self.run(1, seed=2)[1]["exp_avg"])

    def test_rounding_is_right_on_average(self) -> None:
        parameter = nn.Parameter(torch.zeros(200_000))
        optimizer = SGD([parameter], lr=0.0, momentum=0.5, state_dtype=torch.bfloat16)
        value = 1.0 + 2.0**-7 / 3  # a third of the way to the next bfloat16
        parameter.grad = torch.full((200_000,), value)
        optimizer.step()
        rounded = optimizer.state[parameter]["momentum_buffer"].float()
        assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
        assert float(rounded.mean() - value) == pytest.approx(0.0, abs=5e-5)

    def test_small_changes_are_not_lost(self) -> None:
        parameter = nn.Parameter(torch.zeros(50_000))
        optimizer = Adam([parameter], state_dtype=torch.bfloat16)
        for _ in range(300):
            parameter.grad = torch.ones(50_000)
            optimizer.step()
        # With rounding to nearest, v would stop growing once its change is less than half a unit in the last place.
        found = optimizer.state[parameter]["exp_avg_sq"].float().mean()
        assert float(found) == pytest.approx(1 - 0.999**300, rel=0.01)

    def test_float32_states_of_bfloat16_parameters_survive_a_checkpoint(self) -> None:
        parameter = nn.Parameter(torch.randn(30).bfloat16())
        parameter.grad = torch.randn(30).bfloat16()
        optimizer = AdamW([parameter], state_dtype=torch.float32)
        optimizer.step()
        twin = AdamW([parameter], state_dtype=torch.float32)
        twin.load_state_dict(optimizer.state_dict())
        wanted = optimizer.state[parameter]["exp_avg_sq"]
        assert wanted.dtype == torch.float32
        assert torch.equal(twin.state[parameter]["exp_avg_sq"], wanted)
        assert twin.state[parameter]["exp_avg_sq"] is not wanted

    def test_a_checkpoint_of_torch_is_taken_over(self) -> None:
        parameter = nn.Parameter(torch.randn(30))
        parameter.grad = torch.randn(30)
        twin = torch.optim.AdamW([parameter])
        twin.step()
        optimizer = AdamW([parameter], state_dtype=torch.bfloat16)
        optimizer.load_state_dict(twin.state_dict())
        optimizer.step()
        assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
        twin.load_state_dict(optimizer.state_dict())
        twin.step()
        assert twin.state[parameter]["exp_avg"].dtype == torch.float32


class TestRefusals:
    def test_sparse_gradients_before_anything_is_changed(self) -> None:
        first, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
        first.grad = torch.ones(3)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(ArgumentError, match="SparseAdam"):
            AdamW([first, *table.parameters()]).step()
        assert torch.equal(first.detach(), torch.ones(3))

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(ArgumentError, match=str(dtype)):
            AdamW([nn.Parameter(torch.zeros(3).to(dtype), requires_grad=dtype.is_complex)])

    def test_parameters_without_memory_of_their_own(self) -> None:
        # DTensors of fully_shard are such tensors: their address is null, and the kernel would write there.
        with pytest.raises(ArgumentError, match="TwoTensor"):
            AdamW([nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))])

    @pytest.mark.parametrize(
        "options",
        [
            {"foreach": True},
            {"fused": True},
            {"differentiable": True},
            {"nonfinite": "panic"},
            {"max_grad_norm": 0.0},
            {"state_dtype": torch.float16},
            {"seed": -1},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match=next(iter(options))):
            AdamW([nn.Parameter(torch.zeros(3))], **options)

    def test_lion(self) -> None:
        parameter = nn.Parameter(torch.zeros(3))
        with pytest.raises(ArgumentError, match="betas"):
            Lion([parameter], betas=(0.9, 1.0))
        with pytest.raises(ArgumentError, match="momentum"):
            Lion([parameter], momentum=0.9)


class TestWithoutACompiler:
    def test_steps_in_torchs_operations_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        native.load.cache_clear()
        launches._log_once.cache_clear()
        pair = Pair(AdamW, [{"params": [(50,)]}], weight_decay=0.1)
        other = Pair(SGD, [{"params": [(50,)]}], momentum=0.9)
        for _ in range(3):
            for one in (pair, other):
                one.gradients()
                one.step()
        assert [record.message for record in caplog.records if "no-such-compiler" in record.message] != []
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
        native.load.cache_clear()


class OnAGpu(torch.Tensor):
    """A CPU tensor whose `is_cuda` is True."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


class TestHyperparameters:
    def test_zero_in_place_of_a_tensor_on_the_device_is_a_change(self) -> None:
        made, rule = launches.Launches(stochastic=False), rules.lion()
        rate = torch.tensor(0.125, dtype=torch.float64).as_subclass(OnAGpu)
        group: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.99), "weight_decay": 0.0}
        assert made.hyperparameters(rule, [group], torch.device("cpu"))[0, 0] == 0.125
        group["lr"] = 0.0
        assert made.hyperparameters(rule, [group], torch.device("cpu"))[0, 0] == 0.0


class TestLaunches:
    @pytest.mark.parametrize("weights", [7, 224])
    def test_one_call_a_step(self, weights: int) -> None:
        parameters = [nn.Parameter(torch.randn(8, index % 7 + 1)) for index in range(weights)]
        optimizer = AdamW(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                optimizer.step()
            counts = {event.key: event.count for event in profile.key_averages()}
            assert counts["sylva_compile::step(AdamW)"] == 1
            assert counts["Optimizer.step#AdamW.step"] == 1
            assert not any("foreach" in key or key in ("aten::mul_", "aten::copy_") for key in counts)

    def test_tables_are_rebuilt_only_when_storage_moved(self) -> None:
        parameters = [nn.Parameter(torch.randn(40)) for _ in range(3)]
        optimizer = AdamW(parameters)

        def step(present: int) -> int:
            optimizer.zero_grad()
            for parameter in parameters[:present]:
                parameter.grad = torch.randn(40)
            optimizer.step()
            (launch,) = optimizer._launches
            return int(launch.table.rebuilt)

        assert [step(3), step(3), step(1), step(2), step(3)] == [1] * 5
        parameters[1].data = parameters[1].data.clone()
        assert step(3) == 2

    def test_hooks_run(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        optimizer = AdamW([parameter])
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.step()
        assert seen == ["before", "after"]

    def test_source_can_be_had(self) -> None:
        source = AdamW([nn.Parameter(torch.ones(3))], amsgrad=True).kernel_source()
        assert "max_exp_avg_sq" in source
        assert 'extern "C" void step' in source

    def test_autograd_sees_the_write(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        loss = (parameter**2).sum()
        parameter.grad = torch.ones(3)
        AdamW([parameter]).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
