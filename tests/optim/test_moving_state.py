"""States follow blocks that move, and a block that arrives is stepped as a new parameter is."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from newton_schulz import newton_schulz
from oracle import assert_invariant
from torch import Tensor, nn

from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.step.cpu import CpuLaunch
from sylva_compile.kernels.step.eager import EagerLaunch
from sylva_compile.optim import SGD, Adam, AdamW, GeneratedOptimizer, Lion, Muon, RMSprop, launches


class TwinOfLion(torch.optim.Optimizer):
    """Lion as in its paper; `parameter.doubtful` marks elements for which another rounding may turn a step around."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.momentum = torch.zeros_like(parameters[0], requires_grad=False)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        (p,), (beta1, beta2) = group["params"], group["betas"]
        mixed = beta1 * self.momentum + (1 - beta1) * p.grad
        p.doubtful = getattr(p, "doubtful", False) | (mixed.abs() < 1e-6)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mixed.sign(), alpha=group["lr"])
        self.momentum = beta2 * self.momentum + (1 - beta2) * p.grad


CASES: dict[str, tuple[type[GeneratedOptimizer], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (AdamW, torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True, "betas": (0.8, 0.95)}),
    # Where g + weight_decay * p cancels, a small eps would divide rounding errors by almost zero.
    "Adam": (Adam, torch.optim.Adam, {"weight_decay": 0.1, "eps": 0.01}),
    "SGD": (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "RMSprop": (RMSprop, torch.optim.RMSprop, {"momentum": 0.5}),
    "Lion": (Lion, TwinOfLion, {"weight_decay": 0.1, "betas": (0.9, 0.98)}),
    "Muon": (Muon, torch.optim.Muon, {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}),
}
RATE = 0.05


class Twin:
    """One block, or its part inside of a weight, as a parameter of its own, in float64."""

    def __init__(self, case: str, value: Tensor) -> None:
        self.case, self.value = case, nn.Parameter(value.double().clone())
        self.begin()

    def begin(self) -> None:
        """Forget all states."""
        _, kind, options = CASES[self.case]
        self.optimizer = kind([self.value], lr=RATE, **options)

    def assert_is(self, found: Tensor) -> None:
        wanted = self.value.detach()
        sure = ~torch.as_tensor(getattr(self.value, "doubtful", False))
        errors = torch.where(sure, found.double() - wanted, 0).abs()
        assert float(errors.max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


class Side:
    """Blocks, of a weight or of none, with a twin for each block."""

    def __init__(self, case: str, blocks: nn.Parameter, parts: list[tuple[int, int]]) -> None:
        """`parts` are the rows and columns of each block inside of its weight."""
        self.case, self.blocks, self.parts = case, blocks, parts
        self.twins = [Twin(case, self.part(k, blocks.detach())) for k in range(len(parts))]

    def part(self, k: int, blocks: Tensor) -> Tensor:
        rows, cols = self.parts[k]
        return blocks[k, :rows, :cols]

    def new(self) -> Tensor:
        """Values for the blocks, zero beyond the edge of the weight."""
        values = torch.zeros_like(self.blocks)
        for k in range(len(self.parts)):
            self.part(k, values).normal_()
        return values

    def move(self, optimizer: GeneratedOptimizer, share: float, carry: Any) -> None:
        """Let `share` of the blocks leave, and others come; blocks change places with blocks of the same size."""
        order = torch.full((len(self.parts),), -1)
        for size in set(self.parts):
            places = torch.tensor([k for k, part in enumerate(self.parts) if part == size])
            order[places] = places[torch.randperm(len(places))]
        order[torch.rand(len(order)) < share] = -1
        arriving, before = self.new(), self.blocks.detach().clone()
        twins = []
        for k, earlier in enumerate(order.tolist()):
            if earlier < 0:
                twins.append(Twin(self.case, self.part(k, arriving)))
            else:
                arriving[k] = before[earlier]
                twins.append(self.twins[earlier])
        with torch.no_grad():
            self.blocks.copy_(arriving)
        self.twins = twins
        if carry == "none":
            for twin in twins:
                twin.begin()
        optimizer.move_state(self.blocks, order, carry)

    def gradients(self) -> None:
        self.blocks.grad = self.new()
        for k, twin in enumerate(self.twins):
            twin.value.grad = self.part(k, self.blocks.grad).double()

    def compare(self) -> None:
        for k, twin in enumerate(self.twins):
            twin.assert_is(self.part(k, self.blocks.detach()))


class Journey:
    """Blocks of a weight, and blocks without one, with one optimizer."""

    def __init__(self, case: str, b: int, count: int, shape: tuple[int, int], *, sliced: bool, **options: Any) -> None:
        values = torch.randn(count, b, 2 * b)[:, :, ::2]
        free = nn.Parameter(values if sliced else values.contiguous())
        self.model = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        # At least one block, over both edges if there are any.
        grid = torch.rand(-(-shape[0] // b), -(-shape[1] // b)) < 0.5
        grid[-1, -1] = True
        self.masks = Masks.from_block_maps(self.model, {"weight": grid}, b)
        self.masks.embed()
        (state,) = block_states(self.model).values()
        places = zip(state.mask.rows.tolist(), state.mask.cols.tolist(), strict=True)
        parts = [(min(b, shape[0] - row * b), min(b, shape[1] - col * b)) for row, col in places]
        self.sides = [Side(case, free, [(b, b)] * count), Side(case, state.blocks, parts)]
        kind, _, own = CASES[case]
        self.limit = options.get("max_grad_norm")
        self.optimizer = kind([side.blocks for side in self.sides], lr=RATE, **own, **options)

    def step(self, event: str) -> None:
        """Step; gradients are clipped, one of them is infinite, or one parameter has none."""
        for side in self.sides:
            side.gradients()
        stepped = list(self.sides)
        if event == "infinite":
            assert self.sides[1].blocks.grad is not None
            self.sides[1].blocks.grad[0, 0, 0] = torch.inf
            stepped = []
        elif event == "missing":
            stepped.pop().blocks.grad = None
        twins = [twin for side in stepped for twin in side.twins]
        if self.limit is not None:
            nn.utils.clip_grad_norm_([twin.value for twin in twins], self.limit)
        self.optimizer.step()
        for twin in twins:
            twin.optimizer.step()
        for side in self.sides:
            side.compare()
        assert_invariant(self.model, self.masks)


@pytest.fixture(params=[CpuLaunch, EagerLaunch], ids=["generated", "eager"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """Step with the generated kernel and with torch's operations, the two launches of a CPU."""
    chosen: type = request.param
    monkeypatch.setattr(launches, "CpuLaunch", chosen)
    return chosen


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    b = draw(st.sampled_from([8, 11, 24, 32, 64]))
    size = st.integers(b, 3 * b)
    # A step, or a move of either parameter or both before a step.
    moves = st.none() | st.tuples(
        st.sampled_from([(0,), (1,), (0, 1)]),
        st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        st.sampled_from(["intersection", "intersection", "intersection", "none"]),
    )
    events = st.sampled_from(["plain"] * 5 + ["infinite", "missing"])
    return {
        "b": b,
        "count": draw(st.integers(1, 6)),
        "shape": draw(st.tuples(size, size)),
        "sliced": draw(st.sampled_from([False, False, True])),
        "max_grad_norm": draw(st.sampled_from([None, 1.0])),
        "steps": draw(st.lists(st.tuples(moves, events), min_size=4, max_size=25 if b < 64 else 8)),
        "seed": draw(st.integers(0, 1000)),
    }


class TestTrajectory:
    @pytest.mark.parametrize("chosen", [CpuLaunch, EagerLaunch], ids=["generated", "eager"])
    @pytest.mark.parametrize("case", CASES)
    @settings(max_examples=30, deadline=None)
    @given(plan=plans())
    def test_is_that_of_parameters_of_their_own(self, case: str, chosen: type, plan: dict[str, Any]) -> None:
        torch.manual_seed(plan.pop("seed"))
        steps = plan.pop("steps")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
            patch.setattr(launches, "CpuLaunch", chosen)
            journey = Journey(case, nonfinite="skip", **plan)
            for move, event in steps:
                if move is not None:
                    numbers, share, carry = move
                    for number in numbers:
                        journey.sides[number].move(journey.optimizer, share, carry)
                journey.step(event)


def trained(optimizer: GeneratedOptimizer, steps: int = 1, seed: int = 0) -> None:
    """Step by random gradients."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter)
        optimizer.step()


def settled(kind: type[GeneratedOptimizer] = AdamW, count: int = 3, steps: int = 2, **options: Any) -> Any:
    """Blocks and their optimizer after some steps, with the states."""
    blocks = nn.Parameter(torch.randn(count, 8, 8))
    optimizer = kind([blocks], lr=0.01, **options)
    trained(optimizer, steps)
    return blocks, optimizer, optimizer.state[blocks]


class TestAges:
    def test_the_first_step_of_an_arrived_block_is_adams_first_step(self, launch: type) -> None:
        blocks, optimizer, state = settled()
        state["step"].fill_(1000.0)
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        assert state["born"].tolist() == [0.0, 1000.0, 0.0]
        before = blocks.detach().clone()
        trained(optimizer)
        change = (blocks.detach() - before).abs()
        torch.testing.assert_close(change[1], torch.full((8, 8), 0.01), rtol=1e-4, atol=0.0)
        assert {type(one) for one in optimizer._launches} == {launch}

    def test_ages_move_with_their_blocks(self) -> None:
        blocks, optimizer, state = settled(steps=5)
        optimizer.move_state(blocks, torch.tensor([1, 2, 0]), "intersection")
        assert "born" not in state
        optimizer.move_state(blocks, torch.tensor([2, -1, 0]), "intersection")
        assert state["born"].tolist() == [0.0, 5.0, 0.0]
        trained(optimizer, 2)
        optimizer.move_state(blocks, torch.tensor([1, 0, -1]), "intersection")
        assert state["born"].tolist() == [5.0, 0.0, 7.0]
        optimizer.move_state(blocks, torch.tensor([2, 0, 1]), "intersection")
        assert state["born"].tolist() == [7.0, 5.0, 0.0]
        optimizer.move_state(blocks, torch.tensor([-1, -1, -1]), "intersection")
        assert state["born"].tolist() == [7.0, 7.0, 7.0]
        assert float(state["step"]) == 7.0

    def test_a_step_that_is_skipped_counts_nothing(self, launch: type) -> None:
        blocks, optimizer, state = settled(nonfinite="skip")
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        before = copy.deepcopy([blocks.detach(), state])
        blocks.grad = torch.full((3, 8, 8), torch.inf)
        optimizer.step()
        torch.testing.assert_close([blocks.detach(), state], before, rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("kind", [AdamW, SGD])
    def test_only_rules_that_read_the_number_of_the_step_get_ages(self, kind: type[GeneratedOptimizer]) -> None:
        blocks, optimizer, state = settled(kind, state_dtype=torch.float32)
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        assert state["born"].tolist() == [0.0, 2.0, 0.0]
        trained(optimizer)
        (launch,) = optimizer._launches
        assert launch.table.has_ages == (kind is AdamW)

    def test_steps_that_are_not_counted_have_no_ages(self) -> None:
        blocks, optimizer, state = settled(SGD, momentum=0.9)
        momentum = state["momentum_buffer"].clone()
        optimizer.move_state(blocks, torch.tensor([2, -1, 1]), "intersection")
        assert set(state) == {"momentum_buffer"}
        assert torch.equal(state["momentum_buffer"], torch.stack([momentum[2], torch.zeros(8, 8), momentum[1]]))

    def test_blocks_in_another_order_of_memory(self) -> None:
        blocks = nn.Parameter(torch.randn(8, 8, 3).permute(2, 0, 1))
        optimizer = AdamW([blocks])
        trained(optimizer)
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        before = blocks.detach().clone()
        trained(optimizer)
        torch.testing.assert_close((blocks.detach() - before)[1].abs(), torch.full((8, 8), 1e-3), rtol=2e-3, atol=0.0)


class TestInPlace:
    def test_addresses_stay(self) -> None:
        blocks, optimizer, state = settled()
        (launch,) = optimizer._launches
        addresses = {name: value.data_ptr() for name, value in state.items()}
        rebuilt = launch.table.rebuilt
        for order in ([1, 0, -1], [-1, 2, 0], [2, 1, 0]):
            optimizer.move_state(blocks, torch.tensor(order), "intersection")
            trained(optimizer)
            addresses.setdefault("born", state["born"].data_ptr())
            assert {name: value.data_ptr() for name, value in state.items()} == addresses
            assert launch.table.rebuilt == rebuilt + 1
        optimizer.move_state(blocks, torch.tensor([0, 1, 2]), "none")
        addresses.pop("born")
        assert {name: value.data_ptr() for name, value in state.items()} == addresses
        assert all(not value.any() for value in state.values())

    def test_starting_anew_is_being_a_new_optimizer(self, launch: type) -> None:
        blocks, optimizer, _ = settled()
        optimizer.move_state(blocks, torch.tensor([1, 0, -1]), "intersection")
        trained(optimizer)
        optimizer.move_state(blocks, torch.tensor([1, 0, -1]), "none")
        other = nn.Parameter(blocks.detach().clone())
        twin = AdamW([other], lr=0.01)
        for one in (optimizer, twin):
            trained(one, 3, seed=1)
        assert torch.equal(blocks, other)
        torch.testing.assert_close(optimizer.state[blocks], twin.state[other], rtol=0.0, atol=0.0)

    def test_a_parameter_without_state_gets_none(self) -> None:
        blocks = nn.Parameter(torch.randn(3, 8, 8))
        optimizer = AdamW([blocks])
        for carry in ("intersection", "none"):
            optimizer.move_state(blocks, torch.tensor([1, -1, 0]), carry)
        assert not optimizer.state

    def test_states_that_no_rule_names_move_too(self) -> None:
        blocks, optimizer, state = settled()
        mine, other = torch.randn(3, 8, 8, dtype=torch.float64), torch.randn(3, 2)
        state |= {"mine": mine.clone(), "other": other.clone(), "note": "kept", "nothing": None}
        optimizer.move_state(blocks, torch.tensor([2, 0, -1]), "intersection")
        assert torch.equal(state["mine"], torch.cat([mine[[2, 0]], torch.zeros_like(mine[:1])]))
        assert torch.equal(state["other"], other)
        assert (state["note"], state["nothing"]) == ("kept", None)
        optimizer.move_state(blocks, torch.tensor([2, 0, -1]), "none")
        assert not state["mine"].any()

    def test_no_blocks_at_all(self) -> None:
        blocks, optimizer, state = settled(count=0)
        for carry in ("intersection", "none"):
            optimizer.move_state(blocks, torch.empty(0, dtype=torch.int64), carry)
            trained(optimizer)
        assert float(state["step"]) == 1.0

    @pytest.mark.parametrize(
        ("order", "carry", "message"),
        [
            ([0, 1], "intersection", "order"),
            ([[0, 1, 2]], "none", "order"),
            ([0, 1, 3], "intersection", "order"),
            ([0, -2, 1], "none", "order"),
            ([0, 1, 2], "all", "carry='all'"),
        ],
    )
    def test_refusals_change_nothing(self, order: Any, carry: Any, message: str) -> None:
        blocks, optimizer, state = settled()
        before = copy.deepcopy(state)
        with pytest.raises(ArgumentError, match=message):
            optimizer.move_state(blocks, torch.tensor(order), carry)
        torch.testing.assert_close(state, before, rtol=0.0, atol=0.0)

    def test_a_parameter_that_holds_no_blocks_is_refused(self) -> None:
        vector = nn.Parameter(torch.randn(3))
        optimizer = AdamW([vector])
        trained(optimizer)
        with pytest.raises(ArgumentError, match=r"parameter of \(3,\)"):
            optimizer.move_state(vector, torch.tensor([0, 1, 2]), "intersection")


def saved(optimizer: GeneratedOptimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


class TestCheckpoints:
    @pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("kind", [AdamW, SGD, RMSprop, Muon])
    def test_resume_exactly(
        self, kind: type[GeneratedOptimizer], dtype: torch.dtype, state_dtype: torch.dtype | None, launch: type
    ) -> None:
        options: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5} if kind is SGD else {}
        options["state_dtype"] = state_dtype
        blocks = nn.Parameter(torch.randn(4, 8, 8).to(dtype))
        optimizer = kind([blocks], **options)
        trained(optimizer, 2)
        counted = "step" in optimizer.state[blocks]
        if counted:
            # bfloat16 cannot hold it.
            optimizer.state[blocks]["step"].fill_(257.0)
        optimizer.move_state(blocks, torch.tensor([1, 0, 3, -1]), "intersection")
        trained(optimizer, 1)
        twins = []
        for load in (True, False):
            other = nn.Parameter(blocks.detach().clone())
            twin = kind([other], **options)
            if load:
                twin.load_state_dict(saved(optimizer))
            else:
                twin = copy.deepcopy(optimizer)
                (other,) = twin.param_groups[0]["params"]
            twins.append((other, twin))
        for one in (optimizer, *(twin for _, twin in twins)):
            (own,) = one.param_groups[0]["params"]
            one.move_state(own, torch.tensor([-1, 3, 2, 1]), "intersection")
            trained(one, 3, seed=1)
        state = optimizer.state[blocks]
        assert ("born" in state) == counted
        if counted:
            assert state["born"].tolist() == [258.0, 257.0, 0.0, 0.0]
        for other, twin in twins:
            assert torch.equal(other, blocks)
            assert twin.state[other].keys() == state.keys()
            for name, value in state.items():
                assert twin.state[other][name].dtype == value.dtype, name
                assert torch.equal(twin.state[other][name], value), name

    def test_pickled(self) -> None:
        blocks, optimizer, state = settled()
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        twin = pickle.loads(pickle.dumps(optimizer))
        (other,) = twin.param_groups[0]["params"]
        assert torch.equal(twin.state[other]["born"], state["born"])

    def test_another_dtype_and_shape(self) -> None:
        blocks, optimizer, _ = settled()
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        checkpoint = saved(optimizer)
        checkpoint["state"][0]["born"] = checkpoint["state"][0]["born"].double()
        optimizer.load_state_dict(checkpoint)
        assert optimizer.state[blocks]["born"].dtype == torch.float32
        # Whoever sets the state by hand need not know the dtype.
        optimizer.state[blocks]["born"] = torch.tensor([0, 2, 0])
        trained(optimizer)
        assert optimizer.state[blocks]["born"].dtype == torch.float32
        checkpoint["state"][0]["born"] = torch.zeros(4)
        optimizer.load_state_dict(checkpoint)
        before = blocks.detach().clone()
        with pytest.raises(ArgumentError, match=r"born is \(4,\) for a parameter of \(3, 8, 8\)"):
            trained(optimizer)
        with pytest.raises(ArgumentError, match="born is"):
            optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        assert torch.equal(blocks, before)

    def test_torch_takes_ours_and_knows_no_ages(self) -> None:
        blocks, optimizer, _ = settled()
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        twin = torch.optim.AdamW([nn.Parameter(blocks.detach().clone())])
        twin.load_state_dict(saved(optimizer))
        (other,) = twin.param_groups[0]["params"]
        other.grad = torch.ones_like(other)
        twin.step()
        optimizer.load_state_dict(twin.state_dict())
        trained(optimizer)
        assert optimizer.state[blocks]["born"].tolist() == [0.0, 2.0, 0.0]

    def test_a_count_that_is_a_number(self) -> None:
        blocks, optimizer, state = settled()
        state["step"] = 7
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "intersection")
        trained(optimizer)
        assert float(state["step"]) == 8.0
        assert state["born"].tolist() == [0.0, 7.0, 0.0]
        state["step"] = 7
        optimizer.move_state(blocks, torch.tensor([0, -1, 2]), "none")
        trained(optimizer)
        assert float(state["step"]) == 1.0


class TestLowPrecisionStates:
    def test_generated_and_eager_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ends = []
        for kind in (CpuLaunch, EagerLaunch):
            monkeypatch.setattr(launches, "CpuLaunch", kind)
            torch.manual_seed(0)
            blocks = nn.Parameter(torch.randn(40, 24, 24))
            optimizer = AdamW([blocks], lr=0.01, state_dtype=torch.bfloat16)
            trained(optimizer, 2)
            for turn in range(2):
                order = torch.where(torch.rand(40) < 0.4, -1, torch.randperm(40))
                optimizer.move_state(blocks, order, "intersection")
                trained(optimizer, 1, seed=turn)
            state = optimizer.state[blocks]
            assert state["exp_avg"].dtype == torch.bfloat16
            assert state["born"].dtype == torch.float32
            ends.append((blocks.detach(), state["exp_avg"], state["exp_avg_sq"]))
        for mine, other in zip(*ends, strict=True):
            # The last bit of a sum decides now and then about a random rounding.
            assert float(((mine - other).abs() <= 1e-6).float().mean()) > 0.999

    def test_is_near_the_twin(self, launch: type) -> None:
        torch.manual_seed(0)
        blocks = nn.Parameter(torch.randn(3, 8, 8))
        side = Side("AdamW", blocks, [(8, 8)] * 3)
        optimizer = AdamW([blocks], lr=RATE, state_dtype=torch.bfloat16, **CASES["AdamW"][2])
        for turn in range(12):
            if turn % 4 == 3:
                side.move(optimizer, 0.5, "intersection")
            side.gradients()
            optimizer.step()
            for k, twin in enumerate(side.twins):
                twin.optimizer.step()
                error = float((side.part(k, blocks.detach()) - twin.value.detach()).abs().max())
                # A moment keeps 8 bits, and a step is about RATE long.
                assert error < 0.05 * RATE * (turn + 1)
