"""Models with blocks in quantised weights, which trainers of transformers and TRL do not expect."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sylva_compile.blocks.embed import block_states
from sylva_compile.embedded.wide import stay_wide


@contextmanager
def trainable_although_quantised(arguments: Iterable[Any]) -> Iterator[None]:
    """Let the Trainer that is made inside the block take a model with blocks in quantised weights.

    It looks for adapters of PEFT, which it knows, by `is_quantized`; the attribute is as before afterwards.

    Args:
        arguments: those of the Trainer, the model among them.
    """
    models = [each for each in arguments if isinstance(each, nn.Module) and getattr(each, "is_quantized", False)]
    hidden = [model for model in models if any(state.is_quantised for state in block_states(model).values())]
    for model in hidden:
        model.__dict__["is_quantized"] = False
    try:
        yield
    finally:
        for model in hidden:
            model.__dict__["is_quantized"] = True


@contextmanager
def wide_blocks(arguments: Iterable[Any]) -> Iterator[None]:
    """Let blocks keep their dtype and values while a Trainer is made inside of this block.

    TRL assigns bfloat16 to `.data` of everything that is trained in a quantised model.

    Args:
        arguments: those of the Trainer, the model among them.
    """
    models = [each for each in arguments if isinstance(each, nn.Module)]
    # An assignment to `.data` gives a parameter other memory, and the values from before stay where they are.
    kept = [(state.blocks, state.blocks.detach()) for model in models for state in block_states(model).values()]
    try:
        yield
    finally:
        for blocks, before in kept:
            stay_wide(blocks, before, before.dtype)
