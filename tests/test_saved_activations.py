"""A step's saved bytes and peak are about those of the frozen model, and its saved bytes are fewer than LoRA's."""

import torch

from benchmarks import saved_activations, step
from benchmarks.variants import llama, variants


def test_within_two_percent_of_the_frozen_model_and_below_lora() -> None:
    options = ["--inner", "aot_eager", "--hidden", "512", "--layers", "2", "--no-write"]
    results = saved_activations.main(options)
    saved = {name: row["saved_bytes"] for name, row in results.items()}
    assert saved["sylva"] <= 1.02 * saved["frozen"]
    assert saved["sylva"] < 0.9 * saved["lora"]
    assert results["lora"]["trainable"] <= 1.1 * results["sylva"]["trainable"]


def test_the_peak_is_that_of_the_frozen_model() -> None:
    """The step runs Inductor's code: if that keeps a whole activation to copy from, the peak shows it."""
    torch.manual_seed(0)
    base = llama(128, 1024, 1)
    ids = torch.randint(0, base.config.vocab_size, (4, 128))
    peaks = {}
    for each in variants(base, ids, block_size=32, sparsity=0.95, inner="inductor", names=("frozen", "sylva")):
        step.one_step(each)
        peaks[each.name] = step.peak_bytes(each)
    assert peaks["sylva"] <= 1.02 * peaks["frozen"]
