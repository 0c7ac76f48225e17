"""`freeze`: pruned weights for inference alone, without what only training needs."""

from torch import nn

from sylva_compile.blocks.scope import unwrap
from sylva_compile.nm.averaging import note_carried, note_replaced
from sylva_compile.nm.embedding import nm_modules, sharing
from sylva_compile.nm.low_rank import LEFT, RIGHT
from sylva_compile.nm.module import VALUES


def freeze(model: nn.Module) -> None:
    """Drop the second masks of `model`, and let values and adapters be frozen and of their weights' dtype."""
    model = unwrap(model)
    for name, module in nm_modules(model).items():
        layout = module._nm_layout
        layout.freeze()
        owners = sharing(model, layout)
        for attribute in (VALUES, LEFT, RIGHT):
            if (old := module._parameters.get(attribute)) is None or (
                old.dtype == layout.dtype and not old.requires_grad
            ):
                continue
            new = nn.Parameter(old.detach().to(layout.dtype), requires_grad=False)
            note_carried(new, name)
            note_replaced(old, name)
            for owner in owners:
                owner._parameters[attribute] = new
