import pytest
import torch
from oracle import random_masks
from torch import nn

from sylva_compile import print_trainable_parameters
from sylva_compile.blocks.parameters import count_parameters


def test_counts_the_elements_inside_of_the_weights_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 4)).requires_grad_(False)
    assert count_parameters(model) == (0, 20 * 12 + 12 + 12 * 4 + 4)
    masks = random_masks(model, ["0.weight"], 8, 1.0)
    masks.embed()
    # Blocks of 8 cross the edge of a weight of 12 x 20: 4 x 3 blocks hold more values than the weight.
    assert masks.parameters()[0].numel() > 240
    assert count_parameters(torch.nn.Sequential(model)) == (240, 304)
    print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 240 || all params: 304 || trainable%: 78.9474\n"


def test_counts_what_else_is_trained() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    model[0].requires_grad_(False)
    random_masks(model, ["0.weight"], 8, 1.0).embed()
    assert count_parameters(model) == (256 + 34, 256 + 16 + 34)
    model[0].weight_blocks.requires_grad_(False)
    assert count_parameters(model) == (34, 306)


def test_a_model_without_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    print_trainable_parameters(nn.GELU())
    assert "trainable%: 0.0000" in capsys.readouterr().out
