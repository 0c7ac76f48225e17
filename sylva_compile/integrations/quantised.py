"""A model that transformers takes for purely quantised, and so refuses to train, although blocks train in it.

And one whose trained parameters TRL makes bfloat16 when its base is quantised, which blocks would lose small steps by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sylva_compile.blocks.embed import block_states
from sylva_compile.embedded.wide import stay_wide


@contextmanager
def trainable_although_quantised(arguments: Any) -> Iterator[None]:
    """Let the Trainer that is made inside the block take a model with blocks in quantised weights.

    It looks for adapters of PEFT, which it knows, by `is_quantized`; the attribute is as before afterwards. So are the
    dtype and the values of blocks: TRL assigns bfloat16 to `.data` of everything that is trained.

    Args:
        arguments: those of the Trainer, the model among them.
    """
    models = [each for each in arguments if isinstance(each, nn.Module)]
    states = [state for model in models for state in block_states(model).values()]
    # An assignment to `.data` gives a parameter other memory, and the values from before stay where they are.
    kept = [(state.blocks, state.blocks.detach()) for state in states]
    quantised = [model for model in models if getattr(model, "is_quantized", False)]
    hidden = [model for model in quantised if any(state.is_quantised for state in block_states(model).values())]
    for model in hidden:
        model.__dict__["is_quantized"] = False
    try:
        yield
    finally:
        for model in hidden:
            model.__dict__["is_quantized"] = True
        for blocks, before in kept:
            stay_wide(blocks, before, before.dtype)
