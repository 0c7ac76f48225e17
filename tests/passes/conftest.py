"""Joint graphs by hand: placeholders, then operators, each with the fake tensor that AOTAutograd would note on it."""

from typing import Any

import pytest
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg


class Joint:
    """A graph under construction, the real tensors for its placeholders, and the results of its forward half."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.values: list[Tensor] = []
        self.forward: list[Node] = []

    def input(self, name: str, value: Tensor, desc: object = None) -> Node:
        """Add a placeholder; a gradient from outside must be named `tangents_*`, as AOTAutograd names it."""
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        if desc is not None:
            node.meta["desc"] = desc
        self.values.append(value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add `target(*args, **kwargs)` at the end of the graph."""
        node = self.graph.call_function(target, args, kwargs)
        fakes = map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def output(self, *results: Node | None, descs: list[object] | None = None) -> None:
        """End the graph; it returns `results`, then the nodes of `forward`."""
        node = self.graph.output((*results, *self.forward))
        node.meta["desc"] = [*(descs or [None] * len(results)), *[None] * len(self.forward)]

    def run(self) -> list[Tensor]:
        """Run the present graph on the real tensors and return its results."""
        return list(Interpreter(GraphModule(nn.Module(), self.graph)).run(*self.values))

    def targets(self) -> list[Any]:
        """Return the operators, in order."""
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


@pytest.fixture
def joint() -> Joint:
    """An empty graph."""
    return Joint()
