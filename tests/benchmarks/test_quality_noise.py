"""The gain on which parts of the samples agree holds no noise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.quality import concentration, noise
from benchmarks.quality.grid import Settings
from benchmarks.quality.parts import Part, agreed_gains, best, together, trace_parts
from benchmarks.quality.tasks.classification import load_model
from sylva_compile.curvature.importance import diagonal_blocks


def part_of(x: Tensor, gy: Tensor, block_size: int) -> Part:
    tokens = x.shape[0]
    blocks = (diagonal_blocks(each.t() @ each / tokens, block_size) for each in (x, gy))
    return Part(gy.t() @ x / tokens, *blocks, tokens)


def test_it_is_the_mean_product_of_two_steps() -> None:
    """The expected products are computed from the parts' steps, block by block."""
    torch.manual_seed(0)
    parts = [part_of(torch.randn(30, 8).double(), torch.randn(30, 12).double(), 4) for _ in range(3)]
    whole = together(parts)
    products = torch.zeros(3, 2, dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            g, a = whole.g_blocks[row].clone(), whole.a_blocks[column].clone()
            g += 0.1 * whole.g_blocks.diagonal(dim1=1, dim2=2).mean() * torch.eye(4)
            a += 0.1 * whole.a_blocks.diagonal(dim1=1, dim2=2).mean() * torch.eye(4)
            tiles = [p.gradient[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] for p in parts]
            pairs = [(0, 1), (0, 2), (1, 2)]
            steps = [torch.linalg.solve(g, tile) @ torch.linalg.inv(a) for tile in tiles]
            products[row, column] = sum(0.5 * (tiles[i] * steps[j]).sum() for i, j in pairs) / 3
    torch.testing.assert_close(agreed_gains(parts), products)


def test_of_one_and_the_same_part_it_is_the_gain() -> None:
    torch.manual_seed(0)
    part = part_of(torch.randn(30, 9).double(), torch.randn(30, 7).double(), 4)
    torch.testing.assert_close(part.tokens * agreed_gains([part, part, part]), part.gain())


@pytest.mark.parametrize("count", [2, 5])
def test_noise_has_a_gain_and_nothing_that_parts_agree_on(count: int) -> None:
    torch.manual_seed(0)
    x, gy = torch.randn(2000, 32, dtype=torch.float64), torch.randn(2000, 32, dtype=torch.float64)
    parts = [part_of(*pieces, 8) for pieces in zip(x.chunk(count), gy.chunk(count), strict=True)]
    gain, agreed = together(parts).gain().mean(), 2000 * agreed_gains(parts).mean()
    # The gain of noise is half the product of the blocks' effective dimensions, 8 / 1.1 each.
    assert float(gain) == pytest.approx(0.5 * (8 / 1.1) ** 2, rel=0.1)
    assert abs(float(agreed)) < 0.1 * float(gain)


def test_parts_together_are_one_trace_of_all() -> None:
    model = load_model("tiny", 0)
    ids = torch.randint(5, 500, (4, 8, 6))
    batches = [
        {"input_ids": each, "attention_mask": torch.ones_like(each), "labels": torch.arange(8) % 2} for each in ids
    ]
    halves = trace_parts(model, (batches[::2], batches[1::2]), Settings().scope, 8)
    [whole] = zip(*trace_parts(model, (batches,), Settings().scope, 8).values(), strict=True)
    assert len(halves) == 6 * model.config.num_hidden_layers
    for parts, one in zip(halves.values(), whole, strict=True):
        torch.testing.assert_close(together(parts).gain(), one.gain(), rtol=1e-4, atol=1e-6)


def test_the_best_are_as_many_as_the_share_and_one_at_least() -> None:
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert best(scores, 0.5).tolist() == [1, 2]
    assert best(scores, 0.01).tolist() == [1]


@pytest.fixture
def tiny_grid(tmp_path: Path) -> Path:
    (tmp_path / "sst2").mkdir()
    lines = "".join(f"a {word} film {at}\t{label}\n" for word, label in (("good", 1), ("bad", 0)) for at in range(40))
    (tmp_path / "sst2" / "train.tsv").write_text(lines)
    (tmp_path / "sst2" / "dev.tsv").write_text(lines.replace("film", "book"))
    grid = tmp_path / "tiny.toml"
    grid.write_text(
        "learning_rates = [1e-3]\nseeds = [0]\ntasks = { sst2 = {} }\n"
        'settings = { model = "tiny", train = 40, validation = 16, block_size = 8, batch = 8, samples = 16 }\n'
        'methods = { random = { kind = "blocks", trace = "random" } }\n'
    )
    return grid


def test_noise_runs_on_a_grid(tiny_grid: Path) -> None:
    found = noise.main(["--grid", str(tiny_grid), "--data", str(tiny_grid.parent), "--no-write"])
    assert len(found) == 12
    assert all(0 <= row["best_of_halves"] <= 1 and 0 <= row["best_by_gain"] <= 1 for row in found.values())
    assert all(row["gain"] > 0 for row in found.values())


def test_concentration_runs_on_a_grid(tiny_grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--grid", str(tiny_grid), "--data", str(tiny_grid.parent), "--no-write"]
    found = concentration.main([*arguments, "--parts", "3"])
    assert next(iter(found)) == "all weights"
    assert len(found) == 7
    assert all(row["chosen"] <= row["best"] for row in found.values())
    with pytest.raises(SystemExit):
        concentration.main([*arguments, "--parts", "2"])
    assert "give 3 or more" in capsys.readouterr().err
