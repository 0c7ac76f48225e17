"""Serial adapters: small bottlenecks behind layers (Houlsby et al. 2019)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.ready import Budgeted, Ready, Traced, bytes_of, head_alone
from benchmarks.quality.tasks import head_of


class Adapter(nn.Module):
    """A layer followed by a bottleneck with a skip connection (Houlsby et al. 2019), which starts as the identity."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        size = layer.out_features
        self.layer, self.down, self.up = layer, nn.Linear(size, width), nn.Linear(width, size)
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.to(layer.weight.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the adapted outputs `[..., m]` of the layer, from `inputs [..., n]`."""
        value = self.layer(inputs)
        change: Tensor = self.up(nn.functional.gelu(self.down(value)))
        return value + change

    def added(self) -> list[nn.Parameter]:
        """Return the parameters of the bottleneck, which are trained."""
        return [*self.down.parameters(), *self.up.parameters()]


def prepare(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare serial adapters after the output projections of attention and MLP, of the width nearest to the budget.

    They are implemented here because the libraries that offer them require other versions of transformers.

    Raises:
        ValueError: the model has no module named '...output.dense'.
    """
    wanted = budget.elements(model)
    head_alone(model)
    layers = {
        name: m for name, m in model.named_modules() if name.endswith("output.dense") and isinstance(m, nn.Linear)
    }
    if not layers:
        raise ValueError("no module named '...output.dense' to put an adapter after; this kind is for BERT-like models")
    sizes = [layer.out_features for layer in layers.values()]
    width = max(1, round((wanted - sum(sizes)) / sum(2 * size + 1 for size in sizes)))
    added: list[nn.Parameter] = []
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        adapter = Adapter(layer, width)
        setattr(model.get_submodule(parent), attribute, adapter)
        added += adapter.added()
    return Ready(model, added, lambda: bytes_of([*added, *head_of(model)]))
