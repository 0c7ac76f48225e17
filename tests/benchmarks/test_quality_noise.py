"""What two halves of the samples agree on holds no noise."""

from pathlib import Path

import noise
import pytest
import torch
from grid import Settings
from tasks.classification import load_model

from sylva_compile.curvature.importance import diagonal_blocks, gain_scores


def test_of_one_and_the_same_half_it_is_the_gain_and_of_opposite_ones_its_negative() -> None:
    torch.manual_seed(0)
    gradient, x, gy = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 9), (30, 9), (30, 7)))
    blocks = (diagonal_blocks(x.t() @ x / 30, 4), diagonal_blocks(gy.t() @ gy / 30, 4))
    gains = gain_scores(gradient, *blocks, 0.1)
    torch.testing.assert_close(noise.agreed_gains(gradient, gradient, *blocks, 0.1), gains)
    torch.testing.assert_close(noise.agreed_gains(gradient, -gradient, *blocks, 0.1), -gains)


def test_noise_has_a_gain_and_nothing_that_halves_agree_on() -> None:
    torch.manual_seed(0)
    x, gy = torch.randn(2000, 32, dtype=torch.float64), torch.randn(2000, 32, dtype=torch.float64)
    blocks = (diagonal_blocks(x.t() @ x / 2000, 8), diagonal_blocks(gy.t() @ gy / 2000, 8))
    first, second = gy[:1000].t() @ x[:1000] / 1000, gy[1000:].t() @ x[1000:] / 1000
    gain = 2000 * gain_scores((first + second) / 2, *blocks, 0.1).mean()
    agreed = 2000 * noise.agreed_gains(first, second, *blocks, 0.1).mean()
    # Half the product of the blocks' effective dimensions, 8 / 1.1 each.
    assert float(gain) == pytest.approx(0.5 * (8 / 1.1) ** 2, rel=0.1)
    assert abs(float(agreed)) < 0.1 * float(gain)


def test_every_weight_is_scored_in_all_ways() -> None:
    model = load_model("tiny", 0)
    ids = torch.randint(5, 500, (4, 8, 6))
    batches = [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": torch.arange(8) % 2} for each in ids
    ]
    found = noise.halves(model, batches, Settings().scope, 8)
    assert len(found) == 6 * model.config.num_hidden_layers
    for scores in found.values():
        assert set(scores) == {"gain", "agreed", "first", "second"}
        assert all(score.shape == scores["gain"].shape and bool(score.isfinite().all()) for score in scores.values())


def test_it_runs_on_a_grid(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    lines = "".join(f"a {word} film {at}\t{label}\n" for word, label in (("good", 1), ("bad", 0)) for at in range(30))
    (tmp_path / "sst2" / "train.tsv").write_text(lines)
    (tmp_path / "sst2" / "dev.tsv").write_text(lines.replace("film", "book"))
    grid = tmp_path / "tiny.toml"
    grid.write_text(
        "learning_rates = [1e-3]\nseeds = [0]\ntasks = { sst2 = {} }\n"
        'settings = { model = "tiny", train = 40, validation = 16, block_size = 8, samples = 32 }\n'
        'methods = { random = { kind = "blocks", trace = "random" } }\n'
    )
    found = noise.main(["--grid", str(grid), "--data", str(tmp_path), "--no-write"])
    assert len(found) == 12
    assert all(0 <= row["best_of_halves"] <= 1 and 0 <= row["best_by_gain"] <= 1 for row in found.values())
    assert all(row["gain"] > 0 for row in found.values())
