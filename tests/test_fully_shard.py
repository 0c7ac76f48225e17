"""FSDP2: `fully_shard` before or after blocks are embedded trains what one process trains."""

from pathlib import Path

import pytest
import torch
import two_ranks
from torch import nn

from sylva_compile.blocks.shards import copier_of, gather, read_places, whole
from sylva_compile.kernels.blocks import read_blocks


# Weights of 40 to 56 rows and blocks of 16: blocks cross the borders of shards, which are uneven on three processes.
# Four processes hold two copies of the model (HSDP).
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_several_ranks_train_like_one(tmp_path: Path, ranks: int) -> None:
    printed = two_ranks.run("train_sharded.py", str(ranks), tmp_path, ranks=ranks)
    # Every process compares with a twin that it trains alone, and ends with an error where they differ.
    assert all("after, moving" in text for text in printed)


def test_experts_that_are_left_out_of_it(tmp_path: Path) -> None:
    assert all("trained" in text for text in two_ranks.run("experts_sharded.py", tmp_path))


def test_corners(tmp_path: Path) -> None:
    """Ignored weights, evaluations between, passes that fail, gradients that are summed, moves by a trace."""
    assert all("all near" in text for text in two_ranks.run("sharded_corners.py", tmp_path))


def test_ordinary_tensors_are_read_and_written_as_before() -> None:
    matrix = nn.Parameter(torch.randn(40, 56))
    positions = torch.tensor([[0, 2, 1], [3, 0, 1]])
    blocks = read_places(matrix, positions, 16)
    assert torch.equal(blocks, read_blocks(matrix.detach(), positions, 16))
    assert whole(matrix).data_ptr() == matrix.data_ptr() and gather([matrix])[0].data_ptr() == matrix.data_ptr()
    copier_of(matrix, positions, 16).write(2 * blocks)
    assert torch.equal(read_places(matrix, positions, 16), 2 * blocks)
