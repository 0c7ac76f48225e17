"""A Trainer in two processes, under DistributedDataParallel."""

import socket
from pathlib import Path

import two_ranks


def test_two_ranks_resume_the_undisturbed_training(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    two_ranks.run("trainer_two_ranks.py", tmp_path, str(port))
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "sylva_adapter.json", "sylva_schedules.pt"} <= names
    assert not [name for name in names if name.startswith(("model", "tmp-"))]
