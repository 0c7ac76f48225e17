"""A Trainer pre-trains a pruned model, with adapters in the last steps, and resumes before and after they came."""

import copy
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from pretrain_two_ranks import FIRST, STEPS, made, values
from safetensors.torch import load_file
from transformers import TrainerCallback

import sylva_compile
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.integrations import LowRankCallback
from sylva_compile.schedules import ScheduleCallback

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_undisturbed_one(dtype: torch.dtype, tmp_path: Path) -> None:
    once = made(tmp_path, dtype)
    once.train()
    wanted = values(once)
    layer = once.model.model.layers[0].mlp.up_proj
    assert wanted["model.layers.0.mlp.up_proj.weight_right"].any()
    assert any(parameter is layer.weight_left for parameter in once.optimizer.param_groups[0]["params"])
    for stop in (FIRST - 1, FIRST, FIRST + 1):
        checkpoint = tmp_path / f"checkpoint-{stop}"
        again = made(tmp_path / str(stop), dtype, checkpoint)
        torch.rand(7)
        again.train(resume_from_checkpoint=str(checkpoint))
        found = values(again)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), stop


def test_two_ranks_agree_and_resume(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    two_ranks.run("pretrain_two_ranks.py", tmp_path, str(port))


def test_a_share_outside_of_the_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="share=0"):
        LowRankCallback(3, share=0)
    assert LowRankCallback(3).first_step(1000) == 990
    assert LowRankCallback(3).first_step(10) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2, "prune": "never"}, "prune='never'"),
        ({"rank": 2, "share": "half"}, "share='half'"),
        ({"rank": 2, "share": float("nan")}, "share=nan"),
    ],
)
def test_what_the_last_steps_would_find_wrong_is_found_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LowRankCallback(**arguments)


def test_a_training_that_could_not_have_adapters_does_not_begin(tmp_path: Path) -> None:
    trainer = made(tmp_path, torch.float32)
    trainer.model.get_parameter("model.layers.0.mlp.up_proj.weight_values").requires_grad_(False)
    with pytest.raises(ArgumentError, match=r"does not hold the values of model\.layers\.0\.mlp\.up_proj\.weight"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = made(tmp_path, torch.float32)
    trainer.remove_callback(ScheduleCallback)
    sylva_compile.unprune(trainer.model)
    with pytest.raises(EmbedError, match="no pruned weights"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ArgumentError, match="name a checkpoint of the Trainer"):
        made(tmp_path, torch.float32, tmp_path / "nothing")


def unscheduled(directory: Path, *resume_from: Path, **arguments: Any) -> Any:
    """Make a Trainer as `made` does, without a schedule, whose state is in other files."""
    trainer = made(directory, torch.float32, *resume_from, **arguments)
    trainer.remove_callback(ScheduleCallback)
    return trainer


def test_checkpoints_say_whether_they_have_adapters(tmp_path: Path) -> None:
    # The adapters come after step 3 of 6, and would have come after another one in trainings of other lengths.
    unscheduled(tmp_path, save_only_model=True).train()
    before, after = (tmp_path / f"checkpoint-{step}" for step in (FIRST, FIRST + 1))
    shorter = unscheduled(tmp_path / "shorter", max_steps=FIRST + 1)
    shorter.train(resume_from_checkpoint=str(before))
    assert shorter.state.global_step == FIRST + 1
    longer = unscheduled(tmp_path / "longer", max_steps=20)
    with pytest.raises(ArgumentError, match="has adapters; give it as"):
        longer.train(resume_from_checkpoint=str(after))
    named = unscheduled(tmp_path / "named", after, max_steps=20, save_steps=100)
    saved = load_file(after / "model.safetensors")
    found = []
    named.add_callback(OnBegin(lambda model: found.append(model.state_dict())))
    named.train(resume_from_checkpoint=str(after))
    for name, value in saved.items():
        assert torch.equal(found[0][name], value), name
    state = json.loads((after / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["LowRankCallback"]["args"]["rank"] == 3
    state["stateful_callbacks"]["LowRankCallback"]["args"]["rank"] = 4
    (after / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ArgumentError, match="has adapters of rank=4, prune='creation'; give the same"):
        unscheduled(tmp_path / "other", after)
    # Checkpoints of versions that noted nothing.
    del state["stateful_callbacks"]["LowRankCallback"]
    (after / "trainer_state.json").write_text(json.dumps(state))
    old = unscheduled(tmp_path / "old", after)
    assert old.model.model.layers[0].mlp.up_proj.weight_left.shape[0] == 3
    with pytest.raises(ArgumentError, match="has adapters; give it as"):
        unscheduled(tmp_path / "old").train(resume_from_checkpoint=str(after))


class OnBegin(TrainerCallback):
    """Calls a function of the model at the first step."""

    def __init__(self, call: Callable[[Any], None]) -> None:
        self.call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call(copy.deepcopy(kwargs["model"]))


def test_a_checkpoint_with_adapters_is_named(tmp_path: Path) -> None:
    made(tmp_path, torch.float32).train()
    again = made(tmp_path / "again", torch.float32)
    with pytest.raises((ArgumentError, ValueError), match=r"resume_from=|parameter group"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
