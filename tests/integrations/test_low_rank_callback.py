"""A Trainer pre-trains a pruned model, with adapters in the last steps, and resumes before and after they came."""

import socket
from pathlib import Path

import pytest
import torch
import two_ranks
from pretrain_two_ranks import FIRST, STEPS, made, values

from sylva_compile.errors import ArgumentError
from sylva_compile.integrations import LowRankCallback

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


def test_a_checkpoint_with_adapters_is_named(tmp_path: Path) -> None:
    made(tmp_path, torch.float32).train()
    again = made(tmp_path / "again", torch.float32)
    with pytest.raises((ArgumentError, ValueError), match=r"resume_from=|parameter group"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
