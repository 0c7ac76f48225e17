"""What a step saves for its backward: the frozen model's bytes, and less than LoRA's."""

import saved_activations


def test_within_two_percent_of_the_frozen_model_and_below_lora() -> None:
    options = ["--inner", "aot_eager", "--hidden", "512", "--layers", "2", "--no-write"]
    results = saved_activations.main(options)
    saved = {name: row["saved_bytes"] for name, row in results.items()}
    assert saved["sylva"] <= 1.02 * saved["frozen"]
    assert saved["sylva"] < 0.9 * saved["lora"]
    assert results["lora"]["trainable"] <= 1.1 * results["sylva"]["trainable"]
