"""Counts of trainable parameters, in the words of PEFT."""

import math

from torch import nn

from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import unwrap
from sylva_compile.quantised.registry import shape_of


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the trainable elements of `model`, and all of them.

    Blocks lie inside the dense weights, so that their elements count once among all; blocks that cross the edge of a
    weight count the elements inside of it.
    """
    model = unwrap(model)
    states = block_states(model).values()
    for state in states:
        state.check_enabled()
    blocks = {id(state.blocks) for state in states}
    others = [parameter for parameter in model.parameters() if id(parameter) not in blocks]
    trained = sum(state.mask.trainable for state in states if state.blocks.requires_grad)
    trained += sum(parameter.numel() for parameter in others if parameter.requires_grad)
    return trained, sum(math.prod(shape_of(parameter)) for parameter in others)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable elements, of all elements, and the share, in the line that PEFT prints.

    Raises:
        EmbedError: inside of `disable_adapter`, where nothing is trained.
    """
    trained, total = count_parameters(model)
    share = 100 * trained / max(total, 1)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")
