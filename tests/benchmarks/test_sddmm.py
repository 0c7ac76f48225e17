"""The benchmark of the SDDMM runs; a wrong kernel is never timed."""

import pytest
import torch

from benchmarks import gpu, sddmm

SMALL = ["--tokens", "64", "--size", "96", "--blocks", "16", "32", "--shares", "0.2", "--repeats", "3", "--no-write"]


def test_small() -> None:
    rows = sddmm.main(SMALL)
    assert [row["block"] for row in rows] == [16, 32]
    assert all(row["sddmm_ms"] > 0 and row["of_gemm"] > 0 and row["loop_ms"] > 0 for row in rows)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sddmm.sddmm
    monkeypatch.setattr(sddmm, "sddmm", lambda *args: right(*args) * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        sddmm.main(SMALL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for half an hour")
def test_the_gpu_script_says_what_it_lacks() -> None:
    with pytest.raises(SystemExit, match="No CUDA device"):
        gpu.main(["correctness"])
