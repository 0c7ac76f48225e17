"""One of two processes that train together and move blocks: `python move_two_ranks.py RANK DIRECTORY`."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import process_group

from sylva_compile import BlockMask, Masks
from sylva_compile.errors import EmbedError


def main(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    masks = Masks.from_block_maps(model, {"0.weight": torch.tensor([[True, False], [False, False]])}, 8)
    masks.embed()
    together = DistributedDataParallel(model)
    places = [torch.tensor([[False, True], [False, False]]), torch.tensor([[False, False], [True, False]])]
    for _ in range(2):
        # Before the first training pass, and after it.
        with pytest.raises(EmbedError, match="different places"):
            masks.move({"0.weight": BlockMask.from_block_map(places[rank], (16, 16), 8)})
        print("refused")
        together(torch.randn(4, 16)).sum().backward()
        model.zero_grad()
    masks.move({"0.weight": BlockMask.from_block_map(places[0], (16, 16), 8)})
    print("moved")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[2]}/store"):
        main(int(sys.argv[1]))
