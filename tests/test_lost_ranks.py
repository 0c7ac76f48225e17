"""A process that is killed: the others end at once, and fresh jobs go on from the last whole checkpoint."""

from pathlib import Path

import pytest
import two_ranks
from torch.distributed import DistBackendError

from sylva_compile.errors import LostRankError, TraceError
from sylva_compile.lost_ranks import naming_lost_ranks


def test_ten_kills(tmp_path: Path) -> None:
    (printed,) = two_ranks.run("killed_ranks.py", tmp_path, ranks=1)
    assert printed.splitlines()[-1] == "10 kills"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically advice."),
        RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:2. More advice."),
        DistBackendError("NCCL error: remote process exited"),
    ],
)
def test_errors_of_lost_ranks_are_named_in_one_line(error: Exception) -> None:
    with pytest.raises(LostRankError) as raised, naming_lost_ranks("work", "do this"):
        raise error
    said = str(raised.value)
    assert said.startswith("Another process ended during work (") and said.endswith("); do this.")
    assert "dvice" not in said and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2"),
        DistBackendError("Duplicate GPU detected"),
        TraceError("No loss."),
        KeyError("peer"),
    ],
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    @naming_lost_ranks("work", "do this")
    def fail() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            fail()
        assert raised.value is error


def test_a_named_error_is_not_named_again() -> None:
    outer, inner = naming_lost_ranks("all", "do that"), naming_lost_ranks("work", "do this")
    with pytest.raises(LostRankError) as raised, outer, inner:
        raise RuntimeError("Broken pipe")
    assert str(raised.value) == "Another process ended during work (Broken pipe); do this."
