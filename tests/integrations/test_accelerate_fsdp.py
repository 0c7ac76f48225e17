"""A loop with accelerate in two processes, under FSDP2."""

from pathlib import Path

import two_ranks
from like_torchrun import free_port


def test_two_processes_train_like_one_and_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    # Every process compares with a twin that it trains alone, and ends with an error where they differ.
    two_ranks.run("accelerate_fsdp_ranks.py", tmp_path, free_port())
