"""`LayerReport`: what a schedule of layers has drawn, and what makes its backward passes longer than they need be."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.scope import named_weights, plain_name


@dataclass(frozen=True)
class LayerRow:
    """One layer of a schedule.

    Attributes:
        name: the layer's name.
        score: I; a low one marks an important layer.
        times_drawn: the number of draws that held it, the present one included.
        trained: whether it is trained now.
    """

    name: str
    score: float
    times_drawn: int
    trained: bool


@dataclass(frozen=True)
class LayerReport:
    """The layers of a schedule; prints as a table.

    Attributes:
        layers: a row for each layer.
        below: what may keep the backward pass going below the lowest layer that is trained now.
    """

    layers: tuple[LayerRow, ...]
    below: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.layers))
        lines = [f"{'layer':<{width}}  {'score':>8}  {'drawn':>6}  now"]
        for row in self.layers:
            line = f"{row.name:<{width}}  {row.score:>8.4f}  {row.times_drawn:>6}  {'trained' if row.trained else ''}"
            lines.append(line.rstrip())
        trained = sum(row.trained for row in self.layers)
        lines.append(f"{trained} of {len(self.layers)} layers trained now.")
        if self.below:
            shown = ", ".join(self.below[:3]) + (f" and {len(self.below) - 3} more" if len(self.below) > 3 else "")
            lines.append(f"The backward pass may go on below the lowest of them: {shown}.")
        return "\n".join(lines)


def trained_below(model: nn.Module, drawn: Iterable[BlockState]) -> tuple[str, ...]:
    """Name what may keep the backward pass going below the blocks `drawn`.

    That is every parameter which requires grad and is registered before their weights, as embeddings and lower layers
    are; and a hook of transformers that makes the output of the embeddings require grad.
    """
    weights = {id(state.weight) for state in drawn}
    found = []
    for name, parameter in named_weights(model).items():
        if id(parameter) in weights:
            break
        if parameter.requires_grad:
            found.append(name)
    for prefix, module in model.named_modules():
        # The plural holds the hooks of all embeddings; older versions of transformers have the one hook alone.
        if module.__dict__.get("_require_grads_hooks", module.__dict__.get("_require_grads_hook")):
            owner = plain_name(prefix) or type(module).__name__
            found.append(f"{owner}.enable_input_require_grads()")
    return tuple(found)
