"""The optimizer benchmark runs and times every variant."""

from benchmarks import optimizer_step


def test_small() -> None:
    options = "--layers 1 --hidden 128 --mlp 192 --block-size 32 --sparsity 0.7 --repeats 2 --no-write"
    results = optimizer_step.main(options.split())
    assert set(results["variants"]) == set(optimizer_step.VARIANTS)
    assert results["weights"] == 7
    assert results["elements"] > 0
    assert results["of_streaming"] > 0
