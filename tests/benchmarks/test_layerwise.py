"""Methods of the benchmarks that train whole layers in turns."""

import torch
from torch import nn

from benchmarks.quality import layerwise
from benchmarks.quality.layerwise import LayersInTurn

SCOPE = r".*\bh\..*"


class Stack(nn.Module):
    """Four layers between an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.h = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.h:
            x = x + layer(x).tanh()
        return self.classifier(x).square().mean()


def trained_in_turns(model: Stack, layers: LayersInTurn, steps: int) -> list[set[str]]:
    """Train, and return the names of the parameters that each step changed."""
    parameters = dict(model.named_parameters())
    rest = list(model.classifier.parameters())
    optimizer = layers.optimizer([{"params": layers.trained, "lr": 1e-2}, {"params": rest, "lr": 1e-2}])
    changes = []
    for _ in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        model(torch.arange(10)).backward()
        optimizer.step()
        layers.step()
        optimizer.zero_grad()
        changes.append({name for name, value in before.items() if not torch.equal(value, parameters[name])})
        held = {id(parameter) for parameter in optimizer.state}
        changes[-1] |= {f"state of {name}" for name, parameter in parameters.items() if id(parameter) in held}
    return changes


def layers_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("h.")}


def test_badam_trains_every_layer_once_before_any_twice_and_forgets() -> None:
    model = Stack()
    layers = layerwise.badam(model, {"every": 2}, SCOPE, 0)
    changes = trained_in_turns(model, layers, 16)
    turns = [layers_of(names) for names in changes]
    assert all(len(turn) == 1 for turn in turns)
    assert turns[::2] == turns[1::2]
    for cycle in (turns[:8:2], turns[8::2]):
        assert set.union(*cycle) == {"0", "1", "2", "3"}
    assert not any("embed.weight" in names for names in changes)
    # After the first step of a turn the state is that of one layer, and after its last one that of none.
    kept = [layers_of({name.removeprefix("state of ") for name in names if "state" in name}) for names in changes]
    assert [len(each) for each in kept] == [1, 0] * 8


def test_lisa_draws_layers_and_keeps_the_embeddings() -> None:
    model = Stack()
    layers = layerwise.lisa(model, {"every": 2, "layers": 2}, SCOPE, 0)
    changes = trained_in_turns(model, layers, 40)
    turns = [layers_of(names) for names in changes]
    assert all(len(turn) == 2 for turn in turns)
    assert turns[::2] == turns[1::2]
    assert set.union(*turns) == {"0", "1", "2", "3"}
    assert all("embed.weight" in names for names in changes)
    assert "state of h.0.weight" in changes[-1]
