"""Two processes that trace and train a quantised base together end where one process does with all of the data."""

from pathlib import Path

import torch
from quantised_models import needs_bitsandbytes, quiet
from quantised_two_ranks import train
from two_ranks import run

pytestmark = [needs_bitsandbytes, quiet]


def test_two_processes_are_one(tmp_path: Path) -> None:
    run("quantised_two_ranks.py", tmp_path)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    alone = train(0, 1)
    for name, weight in alone["weights"].items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        for found in ranks:
            assert torch.equal(found["places"][name], alone["places"][name]), name
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)
