"""`blocks_state`: what `torch.distributed.checkpoint` saves on some number of processes goes on on any other."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import two_ranks
from small_training import Training, assert_same, masks_of
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.errors import AdapterError, ArgumentError, EmbedError
from sylva_compile.schedules import LayerSchedule, MovingBlocks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_saved_on_two_ranks_and_loaded_on_one_two_and_four(tmp_path: Path) -> None:
    # Every process compares what it has loaded and ends with an error where that differs.
    (printed,) = two_ranks.run("checkpoint_ranks.py", tmp_path, ranks=1)
    assert "all equal" in printed


def save(training: Training, directory: Path) -> None:
    dcp.save({"blocks": training.blocks_state()}, checkpoint_id=directory)


def load(training: Training, directory: Path) -> None:
    dcp.load({"blocks": training.blocks_state()}, checkpoint_id=directory)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    training = Training("alone", every=2)
    training.train(3)
    save(training, tmp_path / "saved")
    return tmp_path / "saved"


class TestGoesOn:
    def test_it_is_a_stateful(self) -> None:
        assert isinstance(Training("alone").blocks_state(), Stateful)

    @pytest.mark.parametrize("before", [0, 1])
    @pytest.mark.parametrize("optimizer", ["adamw", "torch_adamw", "muon"])
    def test_whether_or_not_the_optimizer_has_stepped(self, optimizer: str, before: int, tmp_path: Path) -> None:
        once, again = Training("alone", optimizer), Training("alone", optimizer)
        once.train(before)
        again.train(1 - before)
        save(once, tmp_path)
        load(again, tmp_path)
        assert_same(again.snapshot(), once.snapshot())

    @pytest.mark.parametrize("kind", [sylva_compile.AdamW, torch.optim.AdamW])
    def test_beside_a_scalar_whose_shape_its_count_of_steps_has(self, kind: Any, tmp_path: Path) -> None:
        def made() -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False)
            model.scale = nn.Parameter(torch.tensor(2.0))
            masks = Masks.from_block_maps(model, {"0.weight": torch.eye(2, dtype=torch.bool)}, 8)
            masks.embed(model)
            return model, kind([*masks.parameters(), model.scale], lr=0.1)

        def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
            (model(torch.ones(3, 16)) * model.scale).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        (once, optimizer), (again, other) = made(), made()
        train(once, optimizer)
        dcp.save({"blocks": sylva_compile.blocks_state(once, optimizer)}, checkpoint_id=tmp_path)
        dcp.load({"blocks": sylva_compile.blocks_state(again, other)}, checkpoint_id=tmp_path)
        for model, each in ((once, optimizer), (again, other)):
            train(model, each)
        assert_same(dict(again.named_parameters()), dict(once.named_parameters()))

    @pytest.mark.parametrize(
        "make",
        [
            lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), amsgrad=True),
            lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5, centered=True),
            lambda parameters: sylva_compile.optim.AdamW(parameters, lr=0.1, state_dtype=torch.bfloat16),
            lambda parameters: sylva_compile.optim.SGD(parameters, lr=0.1),
        ],
    )
    def test_with_other_optimizers(self, make: Callable[[Any], torch.optim.Optimizer], tmp_path: Path) -> None:
        trainings = [Training("alone"), Training("alone")]
        for each in trainings:
            each.schedules = []
            each.optimizer = make([*each.masks.parameters(), *each.net.head.parameters()])
            each.rates = torch.optim.lr_scheduler.LinearLR(each.optimizer, 1.0, 0.5, 10)
        once, again = trainings
        once.train(2)
        save(once, tmp_path)
        load(again, tmp_path)
        again.steps = 2
        for each in trainings:
            each.train(2)
        assert_same(again.snapshot(), once.snapshot())

    def test_with_two_optimizers_and_an_unknown_one(self, tmp_path: Path) -> None:
        class Unknown(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            # It steps nothing but what it knows.
                            assert parameter.shape[0] == 4
                            self.state[parameter]["last"] = parameter.grad.clone()
                return super().step(closure)

        def both(training: Training) -> list[torch.optim.Optimizer]:
            training.schedules = []
            head = Unknown(training.net.head.parameters(), lr=0.1)
            return [sylva_compile.AdamW(training.masks.parameters(), lr=0.1), head]

        once, again = Training("alone"), Training("alone")
        optimizers = [both(each) for each in (once, again)]
        for training, pair in zip((once, again), optimizers, strict=True):
            training.net(torch.randn(4, 40).to(torch.bfloat16)).sum().backward()
            for optimizer in pair:
                optimizer.step()
        dcp.save({"b": sylva_compile.blocks_state(once.net, optimizers[0])}, checkpoint_id=tmp_path)
        dcp.load({"b": sylva_compile.blocks_state(again.net, optimizers[1])}, checkpoint_id=tmp_path)
        assert_same(again.snapshot(), once.snapshot())
        lasts = [[value["last"] for value in pair[1].state.values()] for pair in optimizers]
        assert all(map(torch.equal, *lasts))

    def test_blocks_moved_by_hand_with_the_masks(self, tmp_path: Path) -> None:
        once, again = Training("alone"), Training("alone")
        once.train(1)
        once.masks.move(dict(masks_of(copy.deepcopy(once.net), seed=5)), carry="intersection")
        once.train(1)
        save(once, tmp_path)
        with pytest.raises(AdapterError, match="lie elsewhere"):
            load(again, tmp_path)
        state = sylva_compile.blocks_state(again.net, again.optimizer, again.schedules, masks=again.masks)
        dcp.load({"blocks": state}, checkpoint_id=tmp_path)
        assert_same(again.snapshot(), once.snapshot())
        # The optimizer's states follow the next move, too, before the first step.
        again.steps = once.steps
        for each in (once, again):
            each.masks.move(dict(masks_of(copy.deepcopy(once.net), seed=6)), carry="intersection")
            each.train(1)
        assert_same(again.snapshot(), once.snapshot())
        for each in (once, again):
            sylva_compile.unload_adapter(each.net)
        base = Training("alone").net.state_dict()
        for name, value in again.net.state_dict().items():
            assert torch.equal(value, base[name]) or "head" in name

    def test_with_a_schedule_of_layers(self, tmp_path: Path) -> None:
        trainings = [Training("alone"), Training("alone")]
        for each in trainings:
            layers = {f"{number}": [name] for number, name in enumerate(each.masks)}
            each.schedules.append(LayerSchedule(each.masks, policy="random", fraction=0.4, layers=layers))
        once, again = trainings
        for _ in range(3):
            once.model(torch.ones(4, 40, dtype=torch.bfloat16)).sum().backward()
            once.optimizer.step()
            once.schedules[1].step()
            once.optimizer.zero_grad()
        save(once, tmp_path)
        load(again, tmp_path)
        assert again.schedules[1].drawn == once.schedules[1].drawn
        states = [each.optimizer.state_dict()["state"] for each in trainings]
        assert states[0].keys() == states[1].keys()

    def test_after_an_edit_at_places_of_blocks(self, saved: Path) -> None:
        again, expected = Training("alone", every=2), Training("alone", every=2)
        again.schedules.pop()
        state = next(iter(block_states(again.net).values()))
        row, column = (16 * state.mask.positions[:, 0]).tolist()
        with torch.no_grad():
            state.weight[row, column] += 1
        again.evaluate()
        assert state.base_known
        again_state = sylva_compile.blocks_state(again.net, again.optimizer, masks=again.masks)
        dcp.load({"blocks": again_state}, checkpoint_id=saved)
        dcp.load({"blocks": expected.blocks_state()}, checkpoint_id=saved)
        found, wanted = again.snapshot(), expected.snapshot()
        same = {name for name in found if name.startswith(("layers", "state"))}
        assert_same({name: found[name] for name in same}, {name: wanted[name] for name in same})

    def test_values_alone(self, saved: Path) -> None:
        again = Training("alone", every=2)
        dcp.load({"blocks": sylva_compile.blocks_state(again.net, masks=again.masks)}, checkpoint_id=saved)
        expected = Training("alone", every=2)
        load(expected, saved)
        for name, state in block_states(again.net).items():
            assert torch.equal(state.weight, block_states(expected.net)[name].weight)
        assert not again.optimizer.state

    def test_inside_of_an_object_of_the_user(self, tmp_path: Path) -> None:
        class Application:
            def __init__(self, training: Training) -> None:
                self.blocks, self.step = training.blocks_state(), 0

            def state_dict(self) -> dict[str, Any]:
                return {"blocks": self.blocks.state_dict(), "step": self.step}

            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                self.blocks.load_state_dict(state_dict["blocks"])
                self.step = state_dict["step"]

        once, again = Training("alone"), Training("alone")
        once.train(2)
        mine, other = Application(once), Application(again)
        mine.step = 2
        dcp.save({"app": mine}, checkpoint_id=tmp_path)
        dcp.load({"app": other}, checkpoint_id=tmp_path)
        assert other.step == 2
        assert_same(again.snapshot(), once.snapshot())

    def test_random_numbers_do_not_depend_on_saves(self) -> None:
        class Noisy(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                torch.randn(3)
                return super().step(closure)

        training = Training("alone")
        optimizer = Noisy(training.masks.parameters(), lr=1e-3, momentum=0.9)
        state = sylva_compile.blocks_state(training.net, optimizer)
        before = torch.get_rng_state()
        state.state_dict()
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_that_was_compiled(self, saved: Path) -> None:
        again, expected = Training("alone", every=2), Training("alone", every=2)
        for each in (again, expected):
            each.net.compile(backend=sylva_compile.backend(each.masks, inner="aot_eager", on_miss="error"))
        again.train(1)
        for each in (again, expected):
            load(each, saved)
            each.steps = 3
            each.train(2)
        assert_same(again.snapshot(), expected.snapshot())

    def test_checksums_of_frozen_weights_are_computed_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        training = Training("alone")
        training.net.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
        state = training.blocks_state()
        first = state.state_dict()["manifest"]
        module = "sylva_compile.integrations.distributed_checkpoint.checksum"
        monkeypatch.setattr(module, lambda tensor: pytest.fail("computed again"))
        assert state.state_dict()["manifest"] == first
        with torch.no_grad():
            training.net.frozen.add_(1)
        with pytest.raises(pytest.fail.Exception):
            state.state_dict()


class TestIsRefused:
    """In one line, before anything has changed."""

    def refused(self, again: Training, saved: Path, match: str, error: type[Exception] = AdapterError) -> None:
        before = again.snapshot()
        gradient = again.masks.parameters()[0].grad = torch.ones_like(again.masks.parameters()[0])
        with pytest.raises(error, match=match) as raised:
            load(again, saved)
        assert again.masks.parameters()[0].grad is gradient
        assert "\n" not in str(raised.value)
        assert_same(again.snapshot(), before)

    def test_another_base(self, saved: Path) -> None:
        self.refused(Training("alone", every=2, seed=1), saved, "another base: layers.0.weight")

    def test_another_frozen_weight(self, tmp_path: Path) -> None:
        once, again = Training("alone"), Training("alone")
        for each in (once, again):
            each.net.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
        save(once, tmp_path)
        with torch.no_grad():
            again.net.frozen[1] = 2
        self.refused(again, tmp_path, "1 frozen weights differ, frozen first")

    def test_other_places(self, tmp_path: Path) -> None:
        save(Training("alone"), tmp_path)
        self.refused(Training("alone", masks_seed=1), tmp_path, "the blocks of layers.0.weight lie elsewhere")

    @pytest.mark.parametrize("change", ["fewer", "more", "count", "size"])
    def test_other_masks(self, change: str, tmp_path: Path) -> None:
        save(Training("alone"), tmp_path)
        again = Training("alone")
        maps = {name: mask.block_map() for name, mask in again.masks.items()}
        b = 16
        sylva_compile.unload_adapter(again.net)
        if change == "fewer":
            del maps["layers.0.weight"]
        elif change == "more":
            again.net.head.requires_grad_(False)
            maps["head.weight"] = torch.ones(1, 2, dtype=torch.bool)
        elif change == "count":
            maps["layers.1.weight"][:] = True
        else:
            maps["layers.2.weight"], b = torch.ones(1, 2, dtype=torch.bool), 32
            maps = {"layers.2.weight": maps["layers.2.weight"]}
        again.masks = sylva_compile.Masks.from_block_maps(again.net, maps, b)
        again.masks.embed()
        again.optimizer, again.schedules = torch.optim.SGD(again.masks.parameters(), lr=0.1), []
        again.rates = torch.optim.lr_scheduler.LinearLR(again.optimizer)
        match = {"fewer": "layers.0.weight has blocks there", "more": "has no blocks.blocks.head.weight"}
        self.refused(again, tmp_path, match.get(change, "of shape"))

    def test_other_parameters_beside(self, tmp_path: Path) -> None:
        once = Training("alone")
        once.net.head.bias.requires_grad_(False)
        once.optimizer = torch.optim.SGD([*once.masks.parameters(), once.net.head.weight], lr=0.1)
        save(once, tmp_path)
        again = Training("alone")
        self.refused(again, tmp_path, "has no blocks.others.head.bias")
        again.net.to(torch.float64)
        again.net.head.bias.requires_grad_(False)
        again.optimizer = torch.optim.SGD([*again.masks.parameters(), again.net.head.weight], lr=0.1)
        self.refused(again, tmp_path, "load the base of that training")

    def test_another_optimizer(self, saved: Path) -> None:
        self.refused(Training("alone", "muon", every=2), saved, "has no blocks.optimizer.0.layers.0.weight_blocks.mom")

    def test_an_optimizer_with_fewer_states(self, saved: Path) -> None:
        again = Training("alone", every=2)
        parameters = [*again.masks.parameters(), *again.net.head.parameters()]
        again.optimizer = sylva_compile.optim.SGD(parameters, lr=0.1)
        self.refused(
            again, saved, "has exp_avg of layers.0.weight_blocks in torch.float32, which is no state", ArgumentError
        )
        again.optimizer = sylva_compile.AdamW(parameters, lr=0.1, state_dtype=torch.bfloat16)
        self.refused(again, saved, "which is torch.bfloat16 in this AdamW", ArgumentError)
        again.optimizer = sylva_compile.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.1)
        self.refused(again, saved, "1 groups with 5 parameters, and this one 2 with 5", ArgumentError)

    def test_another_schedule(self, saved: Path) -> None:
        self.refused(Training("alone", every=4), saved, "with the same settings", ArgumentError)
        self.refused(Training("alone"), saved, "the blocks of layers.0.weight lie elsewhere")
        again = Training("alone", every=2)
        del again.schedules[0]
        before = again.snapshot()
        with pytest.raises(ArgumentError, match="2 schedules, and blocks_state was given 1"):
            load(again, saved)
        assert again.snapshot().keys() == before.keys()

    def test_a_checkpoint_without_its_last_file(self, saved: Path) -> None:
        (saved / ".metadata").unlink()
        self.refused(Training("alone", every=2), saved, r"no whole checkpoint \(.metadata is missing\)")

    def test_torch_refuses_in_its_own_words_where_its_call_is_not_seen(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)
        monkeypatch.setattr("sylva_compile.integrations.checkpoint_calls.checkpoint_call", lambda: ("", {}))
        again = Training("alone", "muon", every=2)
        before = again.snapshot()
        with pytest.raises(CheckpointException, match="Missing key"):
            load(again, saved)
        assert_same(again.snapshot(), before)
        # Without seeing the call, everything else works as well.
        again, expected = Training("alone", every=2), Training("alone", every=2)
        load(again, saved)
        monkeypatch.undo()
        load(expected, saved)
        assert_same(again.snapshot(), expected.snapshot())

    def test_something_else(self, tmp_path: Path) -> None:
        state = Training("alone").blocks_state()
        with pytest.raises(AdapterError, match="no blocks of this version"):
            state.load_state_dict({"manifest": b""})

    def test_a_base_that_shows(self, saved: Path) -> None:
        again = Training("alone", every=2)
        with sylva_compile.disable_adapter(again.net), pytest.raises(EmbedError, match="leave the block first"):
            load(again, saved)

    def test_a_frozen_weight_that_took_the_place_of_another(self, tmp_path: Path) -> None:
        once, again = Training("alone"), Training("alone")
        for training in (once, again):
            training.net.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        state = once.blocks_state()
        state.state_dict()
        once.net.frozen.data = torch.ones(4)
        dcp.save({"blocks": state}, checkpoint_id=tmp_path)
        self.refused(again, tmp_path, "1 frozen weights differ, frozen first")


class TestSavingIsRefused:
    def test_over_a_checkpoint(self, saved: Path) -> None:
        before = {path.name: path.read_bytes() for path in saved.iterdir()}
        with pytest.raises(ArgumentError, match="a directory of its own"):
            save(Training("alone"), saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before

    def test_without_blocks(self) -> None:
        with pytest.raises(AdapterError, match="carries no trained blocks"):
            sylva_compile.blocks_state(nn.Linear(3, 3))

    def test_with_an_optimizer_of_another_model(self) -> None:
        state = sylva_compile.blocks_state(Training("alone").net, Training("alone").optimizer)
        with pytest.raises(ArgumentError, match="none of this model's"):
            state.state_dict()

    def test_past_autograd(self) -> None:
        training = Training("alone")
        training.masks.parameters()[0].data.add_(1)
        with pytest.raises(EmbedError, match="blocks and dense weight differ"):
            training.blocks_state().state_dict()

    def test_with_a_base_that_is_not_known(self) -> None:
        training = Training("alone")
        with torch.no_grad():
            training.net.layers[0].weight.add_(1)
        with pytest.raises(EmbedError, match="its base is not known"):
            training.blocks_state().state_dict()

    def test_with_states_on_one_process_each(self) -> None:
        training = Training("alone")
        optimizer: Any = torch.optim.SGD(training.masks.parameters(), lr=0.1)
        optimizer.consolidate_state_dict = None
        with pytest.raises(ArgumentError, match="keeps each state on one process"):
            sylva_compile.blocks_state(training.net, optimizer).state_dict()


def test_moving_blocks_are_resumed_by_their_schedule_alone(saved: Path) -> None:
    """A schedule that moves is enough; learning rates may be saved beside."""
    once = Training("alone", every=2)
    assert isinstance(once.schedules[1], MovingBlocks)
    load(once, saved)
    assert once.schedules[1].moves == 1
