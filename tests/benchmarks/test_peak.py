"""`peak_above` returns the highest memory above that at the start, not the sum of allocations or the final memory."""

import torch

from benchmarks.peak import peak_above

CPU = torch.device("cpu")


def test_the_highest_level_counts() -> None:
    def work() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first, second
        return torch.empty(500, dtype=torch.uint8)

    result, peak = peak_above(work, CPU)
    assert result.numel() == 500
    assert peak == 4000


def test_what_was_there_before_counts_to_the_end() -> None:
    held = [torch.empty(5000, dtype=torch.uint8)]

    def work() -> torch.Tensor:
        held.clear()
        return torch.empty(2000, dtype=torch.uint8)

    assert peak_above(work, CPU)[1] == 2000
