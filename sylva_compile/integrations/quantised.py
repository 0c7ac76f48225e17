"""A model that transformers takes for purely quantised, and so refuses to train, although blocks train in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sylva_compile.blocks.embed import block_states


@contextmanager
def trainable_although_quantised(arguments: Any) -> Iterator[None]:
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
