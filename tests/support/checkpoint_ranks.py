"""Save checkpoints on two processes, and load them on one, two and four: `python checkpoint_ranks.py 0 DIRECTORY`."""

import sys
from pathlib import Path

import forked_ranks
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from small_training import HOW, Training, assert_same, warm_up
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from sylva_compile.errors import AdapterError, ArgumentError

STEPS, MORE = 3, 2
CASES = (("ddp", "adamw", 2), ("ddp", "torch_adamw", 0), ("before", "muon", 0), ("before", "adamw", 2))
CASES += (("before", "torch_adamw", 2), ("after", "adamw", 0), ("after", "torch_adamw", 2))


def folder(directory: Path, how: str, optimizer: str, every: int) -> Path:
    return directory / f"{how}-{optimizer}-{every}"


def save(directory: Path) -> None:
    for case in CASES:
        there = folder(directory, *case)
        once = Training(*case)
        once.train(STEPS)
        once.evaluate()
        state = once.blocks_state()
        dcp.save({"blocks": state}, checkpoint_id=there / "saved")
        once.train(1)
        with pytest.raises(ArgumentError, match="holds a checkpoint"):
            dcp.save({"blocks": state}, checkpoint_id=there / "saved")
        saved, again = once.snapshot(), Training(*case)
        again.evaluate()
        dcp.load({"blocks": again.blocks_state()}, checkpoint_id=there / "saved")
        expected = again.snapshot()
        again.steps = STEPS
        again.train(1)
        assert_same(again.snapshot(), saved)
        again.train(MORE - 1)
        once.train(MORE - 1)
        assert_same(again.snapshot(), once.snapshot())
        # In a training that has gone elsewhere, with gradients.
        again.train(2)
        again.model(torch.randn(4, 40).to(torch.bfloat16)).sum().backward()
        dcp.load({"blocks": again.blocks_state()}, checkpoint_id=there / "saved")
        assert_same(again.snapshot(), expected)
        assert all(blocks.grad is None for blocks in again.masks.parameters())
        if dist.get_rank() == 0:
            torch.save(expected, there / "expected.pt")


def save_beside_training(directory: Path) -> None:
    group = dist.new_group(backend="gloo")
    for case in (("ddp", "adamw", 2), ("before", "adamw", 2)):
        once, there = Training(*case), folder(directory, *case) / "async"
        once.train(STEPS)
        expected, state = once.snapshot(), once.blocks_state()
        for given in (None, dist.group.WORLD):
            with pytest.raises(ArgumentError, match="new_group"):
                dcp.async_save({"blocks": state}, checkpoint_id=there, process_group=given)
        future = dcp.async_save({"blocks": state}, checkpoint_id=there, process_group=group)
        once.train(4)
        future.result()
        again = Training(*case)
        dcp.load({"blocks": again.blocks_state()}, checkpoint_id=there)
        assert_same(again.snapshot(), expected)
        again.steps = STEPS
        again.train(4)
        assert_same(again.snapshot(), once.snapshot())


def beside_a_model(directory: Path) -> None:
    """A model's own state dict, in the same checkpoint, has the trained values of all places in the dense weights."""

    class Model:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def state_dict(self) -> dict[str, torch.Tensor]:
            return get_model_state_dict(self.model)

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            set_model_state_dict(self.model, state)

    for how in ("ddp", "before"):
        for name in ("a", "z"):
            once, again = Training(how, every=2), Training(how, every=2)
            once.train(STEPS)
            there = directory / f"beside-{how}-{name}"
            dcp.save({"m": once.blocks_state(), name: Model(once.net)}, checkpoint_id=there)
            dcp.load({"m": again.blocks_state(), name: Model(again.net)}, checkpoint_id=there)
            assert_same(again.snapshot(), once.snapshot())


def load(directory: Path, *how: str) -> None:
    """Load each checkpoint, under `how` or as it was saved; on four processes the last weight has a block on two."""
    for case in CASES:
        expected = torch.load(folder(directory, *case) / "expected.pt")
        for mine in how or (case[0],):
            again = Training(mine, *case[1:])
            dcp.load({"blocks": again.blocks_state()}, checkpoint_id=folder(directory, *case) / "saved")
            assert_same(again.snapshot(), expected)
            again.steps = STEPS
            again.train(MORE)
    alone = Training(how[0] if how else "before", every=2, seed=1)
    before = alone.snapshot()
    with pytest.raises(AdapterError, match="another base"):
        dcp.load({"blocks": alone.blocks_state()}, checkpoint_id=folder(directory, "ddp", "adamw", 2) / "saved")
    assert_same(alone.snapshot(), before)


def main(directory: Path) -> None:
    warm_up()
    forked_ranks.run(save, 2, directory / "store2", directory)
    forked_ranks.run(save_beside_training, 2, directory / "store2 async", directory)
    forked_ranks.run(beside_a_model, 2, directory / "store2 beside", directory)
    forked_ranks.run(load, 2, directory / "store2 again", directory, *HOW)
    forked_ranks.run(load, 4, directory / "store4", directory)
    forked_ranks.run(load, 1, directory / "store1", directory, "alone")
    print("all equal")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
