"""States, models and optimizers that do not fit a schedule are refused, and a call that fails leaves all as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from tiny_models import tiny
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.integrations import BlocksCallback
from sylva_compile.integrations.accelerate import BlocksState
from sylva_compile.schedules import LayerSchedule, MovingBlocks, ScheduleCallback


class Stack(nn.Module):
    """Four linear layers of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def stack(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Stack, Masks]:
    """Make a frozen stack and its masks, which lie at the same places for every seed."""
    torch.manual_seed(seed)
    model = Stack().to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    maps = {name: torch.rand(4, 4, generator=generator) < 0.4 for name, _ in model.named_parameters()}
    masks = Masks.from_block_maps(model, maps, 8)
    masks.embed()
    return model, masks


def train(model: Stack, optimizer: torch.optim.Optimizer, schedule: Any = None, steps: int = 1) -> None:
    for step in range(steps):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).to(model.layers[0].weight.dtype)
        model(x).float().square().sum().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def is_synced(model: nn.Module) -> bool:
    return all(state.is_synced() for state in block_states(model).values())


@pytest.mark.parametrize(("seed", "dtype"), [(1, torch.float32), (0, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["schedule", "blocks"])
def test_a_state_of_another_base(kind: str, seed: int, dtype: torch.dtype) -> None:
    trained, masks = stack(seed, dtype)
    schedule = MovingBlocks(masks, every=2)
    train(trained, sylva_compile.AdamW(masks.parameters(), lr=0.01), schedule if kind == "schedule" else None, 4)
    model, masks = stack()
    base = copies(model)
    if kind == "schedule":
        with pytest.raises(ArgumentError, match="another base or dtype"):
            MovingBlocks(masks, every=2).load_state_dict(schedule.state_dict())
    else:
        with pytest.raises(ArgumentError, match="other values than the base"):
            BlocksState(model).load_state_dict(BlocksState(trained).state_dict())
    assert is_synced(model)
    assert_same(copies(model), base)
    sylva_compile.unload_adapter(model)
    assert_same(copies(model), base)


def test_blocks_of_another_size_change_nothing() -> None:
    model, _ = stack(dtype=torch.bfloat16)
    state, before = BlocksState(model).state_dict(), copies(model)
    for known in state["weights"].values():
        known["blocks"] = known["blocks"] + 1
    known["blocks"] = known["blocks"][:, :4]
    with pytest.raises(ArgumentError, match=r"layers\.3\.weight are \(\d, 4, 8\) in the checkpoint"):
        BlocksState(model).load_state_dict(state)
    assert_same(copies(model), before)


def out_of_memory_at(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a method of the block state of one weight run out of memory."""
    through = getattr(BlockState, method)

    def run_out(self: BlockState, *arguments: Any) -> Any:
        if self.name == name:
            raise torch.OutOfMemoryError
        return through(self, *arguments)

    monkeypatch.setattr(BlockState, method, run_out)


def test_a_move_that_runs_out_of_memory_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = stack()
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    schedule = MovingBlocks(masks, every=100)
    train(model, optimizer)
    before = copies(model)
    with monkeypatch.context() as patch:
        out_of_memory_at("layers.2.weight", "_dense_blocks", patch)
        with pytest.raises(torch.OutOfMemoryError):
            schedule.move()
    assert is_synced(model)
    assert_same(copies(model), before)
    assert all(masks[name] == state.mask for name, state in block_states(model).items())
    train(model, optimizer)
    # Values of old places at new ones were changes of a third, and the step is one of a hundredth.
    assert max(float((tensor - before[name]).abs().max()) for name, tensor in copies(model).items()) < 0.011
    schedule.move()
    assert is_synced(model)


def test_a_resume_that_runs_out_of_memory_can_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = stack()
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    schedule = MovingBlocks(masks, every=1)
    train(model, optimizer, schedule)
    state, weights = copy.deepcopy(schedule.state_dict()), copies(model)
    train(model, optimizer, schedule, 2)
    model.load_state_dict(weights)
    with monkeypatch.context() as patch:
        out_of_memory_at("layers.2.weight", "_originals_with", patch)
        with pytest.raises(torch.OutOfMemoryError):
            schedule.load_state_dict(state)
    schedule.load_state_dict(state)
    assert is_synced(model)
    assert_same(copies(model), weights)


def test_a_move_while_the_base_is_shown_loses_nothing() -> None:
    model, masks = stack()
    schedule = MovingBlocks(masks, every=1)
    model(torch.ones(1, 32)).sum().backward()
    before = copy.deepcopy(schedule.state_dict())
    with sylva_compile.disable_adapter(model), pytest.raises(EmbedError):
        schedule.step()
    assert all(state.blocks.grad is not None for state in block_states(model).values())
    assert schedule.steps == before["steps"]
    assert torch.equal(schedule.state_dict()["generator"], before["generator"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "8"}, "every=8"),
        ({"every": float("nan")}, "every=nan"),
        ({"every": float("inf")}, "every=inf"),
        ({"temperature": "hot"}, "temperature=hot"),
        ({"carry": "bogus"}, "carry='bogus'"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)}, "does not step"),
    ],
)
def test_options_are_checked_before_the_first_move(options: dict[str, Any], message: str) -> None:
    _, masks = stack()
    with pytest.raises(ArgumentError, match=message):
        MovingBlocks(masks, **options)


def test_masks_and_states_of_another_kind() -> None:
    model, masks = stack()
    with pytest.raises(ArgumentError, match="masks is a Stack"):
        MovingBlocks(model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no state of MovingBlocks"):
        MovingBlocks(masks).load_state_dict(None)  # type: ignore[arg-type]


def test_an_optimizer_that_cannot_carry_is_found_at_the_first_step() -> None:
    model, masks = stack()
    optimizer = torch.optim.AdamW(masks.parameters(), lr=0.01)
    with pytest.raises(ArgumentError, match=r"carry|intersection"):
        MovingBlocks(masks, every=100, carry="intersection", optimizer=optimizer)
    schedule = MovingBlocks(masks, every=100, carry="intersection")
    with pytest.raises(ArgumentError, match=r"carry|intersection"):
        train(model, optimizer, schedule)


def test_states_that_were_loaded_follow_before_the_first_step(tmp_path: Path) -> None:
    model, masks = stack()
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    train(model, optimizer)
    sylva_compile.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = Stack().requires_grad_(False)
    for name in ("one", "other"):
        sylva_compile.load_adapter(fresh, tmp_path / "adapter", name)
    again = sylva_compile.AdamW(sylva_compile.set_adapter(fresh, "one").parameters(), lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert any(state["exp_avg"].any() for state in again.state.values())
    sylva_compile.set_adapter(fresh, "other")
    assert not any(state["exp_avg"].any() for state in again.state.values())


class TestLayerSchedule:
    def test_an_optimizer_made_of_what_was_drawn(self) -> None:
        model, masks = stack()
        schedule = LayerSchedule(masks, "random", fraction=0.25)
        optimizer = sylva_compile.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        with pytest.raises(ArgumentError, match=r"does not step the blocks of .* make the optimizer first"):
            train(model, optimizer, schedule, 20)

    @pytest.mark.parametrize("how", ["skipped", "one each"])
    def test_optimizers_that_step_all(self, how: str) -> None:
        model, masks = stack()
        schedule = LayerSchedule(masks, "random", fraction=0.25)
        parts = [[p] for p in masks.parameters()] if how == "one each" else [masks.parameters()]
        optimizers = [sylva_compile.AdamW(part, lr=0.01) for part in parts]
        for step in range(12):
            model(torch.ones(1, 32)).sum().backward()
            # GradScaler skips steps as well.
            if how == "one each" or step % 3:
                for optimizer in optimizers:
                    optimizer.step()
            schedule.step()
            model.zero_grad()

    def test_blocks_that_are_gone(self) -> None:
        model, masks = stack()
        schedule = LayerSchedule(masks, "random", fraction=0.25)
        schedule.step()
        sylva_compile.unload_adapter(model)
        masks.embed(model)
        with pytest.raises(EmbedError, match="other blocks now"):
            schedule.step()

    def test_states_of_other_settings(self) -> None:
        def made(**options: Any) -> LayerSchedule:
            _, masks = stack()
            chosen = {"policy": "random", "fraction": 0.25, **options}
            return LayerSchedule(masks, **chosen)

        names = [f"layers.{at}.weight" for at in range(4)]
        measured = {"policy": "importance", "batches": [0], "loss": lambda model, batch: torch.zeros(())}
        few = made(**measured).state_dict()
        few["scores"] = few["scores"][:2]
        cases: list[tuple[LayerSchedule, dict[str, Any], str]] = [
            (made(fraction=0.75), made().state_dict(), "size="),
            (made(layers={name: [name] for name in reversed(names)}), made().state_dict(), "layers="),
            (made(**measured, every=3), made(**measured, every=10).state_dict(), "every="),
            (made(**measured), few, "make the schedule as it was made then"),
        ]
        for schedule, state, message in cases:
            drawn = schedule.drawn
            with pytest.raises(ArgumentError, match=message):
                schedule.load_state_dict(state)
            assert schedule.drawn == drawn
        old = made().state_dict()
        del old["settings"]
        made().load_state_dict(old)


RANK = """
import sys
sys.path[:0] = sys.argv[3:]
import pytest
import torch
import two_ranks
from test_other_states import EmbedError, LayerSchedule, stack, train

rank = int(sys.argv[1])
with two_ranks.process_group(rank, sys.argv[2]) as group:
    batches = [torch.full((1, 32), rank + 1.0)]
    measured = {"every": 2, "batches": batches, "loss": lambda model, batch: model(batch).square().sum(), "seed": 0}
    for policy, options, fits in (
        ("random", {"seed": rank}, False),
        ("random", {"seed": 0}, True),
        ("importance", measured, False),
        ("importance", {**measured, "process_group": group}, True),
    ):
        model, masks = stack()
        optimizer = torch.optim.AdamW(masks.parameters(), lr=1e-2)
        ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        ddp.layers = model.layers
        schedule = LayerSchedule(masks, policy, fraction=0.25, **options)
        if fits:
            train(ddp, optimizer, schedule, 6)
        else:
            with pytest.raises(EmbedError, match="would train different layers"):
                train(ddp, optimizer, schedule, 6)
        print(policy, fits)
"""


def test_processes_that_would_draw_different_layers(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    here = Path(__file__).parent
    first, second = two_ranks.run(str(script), tmp_path / "store", here, here.parent / "support")
    assert first == second
    assert len(first.splitlines()) == 4


def trainer(directory: Path, callbacks: Callable[[Masks], Any], dtype: torch.dtype = torch.float32) -> Trainer:
    """Make a Trainer of a tiny model with random blocks; a callback is made of its masks."""
    torch.manual_seed(0)
    case = tiny("llama", layers=1)
    case.model.to(dtype).requires_grad_(False)
    masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)
    masks.embed()
    data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(12)]
    args = TrainingArguments(
        str(directory), max_steps=4, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True, seed=1
    )
    args.disable_tqdm = True
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.001)
    callback = callbacks(masks)
    return Trainer(case.model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])  # type: ignore[arg-type]


class TestCallbacks:
    @pytest.mark.parametrize("own", [False, True])
    def test_an_optimizer_of_the_trainers_own_trains_all_layers(self, own: bool, tmp_path: Path) -> None:
        torch.manual_seed(0)
        case = tiny("llama", layers=2)
        case.model.requires_grad_(False)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.8, block_size=8)
        schedule = LayerSchedule(masks, "random", fraction=0.5)
        first = schedule.drawn
        base = copies(case.model)
        data = [{name: value[k % 4] for name, value in case.batch.items()} for k in range(12)]
        args = TrainingArguments(str(tmp_path), max_steps=12, learning_rate=0.01, report_to=[], use_cpu=True)
        options: Any = {} if own else {"optimizer_cls_and_kwargs": (sylva_compile.AdamW, {"lr": 0.01})}
        callback = ScheduleCallback(schedule)
        Trainer(case.model, args, train_dataset=data, callbacks=[callback], **options).train()
        drawn = {row.name: row.times_drawn for row in schedule.report().layers}
        assert min(drawn.values()) > 1 and len(first) == 1
        found = copies(case.model)
        for layer in drawn:
            assert any(not torch.equal(found[name], base[name]) for name in base if name.startswith(layer)), layer

    def test_schedules_of_another_model(self, tmp_path: Path) -> None:
        _, masks = stack()
        for schedule in (MovingBlocks(masks, every=1), LayerSchedule(masks, "random", fraction=0.25)):
            made = trainer(tmp_path, lambda _, schedule=schedule: ScheduleCallback(schedule))  # type: ignore[misc]
            with pytest.raises(ArgumentError, match="is of another model than the Trainer's"):
                made.train()

    def test_a_list_of_schedules(self) -> None:
        _, masks = stack()
        with pytest.raises(ArgumentError, match="A list is no schedule; give them one by one"):
            ScheduleCallback([MovingBlocks(masks)])  # type: ignore[arg-type]

    def test_a_checkpoint_without_the_float32_values(self, tmp_path: Path) -> None:
        kinds = {"plain": ScheduleCallback, "blocks": BlocksCallback}
        for name, kind in kinds.items():
            trainer(tmp_path / name, lambda _, kind=kind: kind(), torch.bfloat16).train()  # type: ignore[misc]
        again = trainer(tmp_path / "plain", lambda _: BlocksCallback(), torch.bfloat16)
        with pytest.raises(ArgumentError, match="blocks are rounded; resume it with the ScheduleCallback"):
            again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
        again = trainer(tmp_path / "blocks", lambda _: BlocksCallback(), torch.bfloat16)
        again.train(resume_from_checkpoint=str(tmp_path / "blocks" / "checkpoint-2"))
