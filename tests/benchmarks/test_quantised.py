"""The benchmark of quantised bases runs on a small shape: saved bytes at the floor, and below QLoRA's."""

from quantised_models import needs_bitsandbytes, quiet

from benchmarks import quantised

pytestmark = quiet


@needs_bitsandbytes
def test_saved_bytes_are_those_of_the_frozen_base_and_below_qlora() -> None:
    options = "--hidden 128 --mlp 256 --layers 1 --tokens 128 --length 64 --block-size 32 --sparsity 0.9 --repeats 2"
    results = quantised.main([*options.split(), "--inner", "aot_eager", "--no-write"])
    assert results["sylva"]["saved_bytes"] <= 1.02 * results["frozen"]["saved_bytes"]
    assert results["sylva"]["packed_bytes"] == results["frozen"]["packed_bytes"]
    if "qlora" in results:
        assert results["sylva"]["saved_bytes"] < 0.9 * results["qlora"]["saved_bytes"]
