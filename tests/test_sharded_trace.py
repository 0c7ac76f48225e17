"""A trace of a model that `fully_shard` has split chooses the blocks that one process chooses on the joint batch."""

from pathlib import Path

import pytest
import torch
import two_ranks
from torch import Tensor
from trace_sharded import OPTIONS, Called, Fan, Stack, llama, sentences

import sylva_compile
from sylva_compile import Masks


@pytest.fixture(scope="module")
def alone() -> tuple[Masks, dict[str, dict[str, Tensor]]]:
    masks = sylva_compile.trace_and_mask(llama(), sentences(), **OPTIONS)
    exact = Fan(Stack()).scores
    others = {"bfloat16": Fan(Stack().bfloat16()).scores, "called": Fan(Called()).scores}
    return masks, {"float32": exact, "checkpointed": exact, **others}


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_trace_like_one(
    tmp_path: Path, ranks: int, alone: tuple[Masks, dict[str, dict[str, Tensor]]]
) -> None:
    two_ranks.run("trace_sharded.py", str(ranks), tmp_path, ranks=ranks)
    masks, scores = alone
    for rank in range(ranks):
        assert dict(Masks.load(tmp_path / f"llama{rank}")) == dict(masks)
    for case in scores if ranks == 2 else ["float32"]:
        for rank in range(ranks):
            for name, found in torch.load(tmp_path / f"{case}{rank}").items():
                wanted = scores[case][name]
                torch.testing.assert_close(
                    found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()), msg=f"{case} {name}"
                )
