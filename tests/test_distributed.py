"""DistributedDataParallel needs nothing special: blocks are parameters like any other."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_ranks
from train_two_ranks import case_and_masks, train

import sylva_compile


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    two_ranks.run("train_two_ranks.py", tmp_path)
    case, masks = case_and_masks()
    train(case.model, masks, case.batch)
    alone = case.model.state_dict()
    for how in ("inside", "outside"):
        first, second = (torch.load(tmp_path / f"{how}{rank}") for rank in (0, 1))
        for name, value in alone.items():
            assert torch.equal(first[name], second[name]), f"{how}: ranks differ in {name}"
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["compiled", "parallel"])
def test_wrapped_models_are_found(wrapper: str, tmp_path: Path) -> None:
    case, masks = case_and_masks()
    model: torch.nn.Module = case.model
    if wrapper == "compiled":
        model = torch.compile(case.model, backend="eager")
    else:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        masks.embed()
        model = torch.nn.parallel.DistributedDataParallel(case.model)
    try:
        masks.embed(model)
        sylva_compile.save_adapter(model, tmp_path / "adapter")
        sylva_compile.unload_adapter(model)
        assert list(sylva_compile.load_adapter(model, tmp_path / "adapter")) == list(masks)
    finally:
        if wrapper == "parallel":
            dist.destroy_process_group()
