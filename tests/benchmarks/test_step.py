"""The step benchmark runs, and compares what it says it compares."""

import step
from variants import VARIANTS


def test_small() -> None:
    options = "--hidden 64 --mlp 96 --layers 1 --tokens 32 --length 16 --block-size 16 --sparsity 0.7 --repeats 2"
    results = step.main([*options.split(), "--inner", "aot_eager", "--no-write"])
    assert set(results) == set(VARIANTS)
    assert results["frozen"]["of_floor"] == 1.0
    assert 0 < results["sylva"]["trainable"] < results["full"]["trainable"]
