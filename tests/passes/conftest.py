"""Joint graphs by hand: placeholders, then operators, each with the fake tensor that AOTAutograd would note on it."""

from typing import Any

import pytest
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg


class Joint:
    """A graph under construction, the real tensors that its placeholders stand for, and what the forward half needs."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.values: list[Tensor] = []
        self.forward: list[Node] = []

    def input(self, name: str, value: Tensor, desc: object = None) -> Node:
        """A placeholder; one of the backward half is to be named `tangents_*`, as AOTAutograd does."""
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        if desc is not None:
            node.meta["desc"] = desc
        self.values.append(value)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """`target(*args, **kwargs)` at the end of the graph."""
        node = self.graph.call_function(target, args, kwargs)
        fakes = map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def output(self, *results: Node | None, descs: list[object] | None = None) -> None:
        """End the graph, with what is in `forward` besides `results`."""
        node = self.graph.output((*results, *self.forward))
        node.meta["desc"] = [*(descs or [None] * len(results)), *[None] * len(self.forward)]

    def run(self) -> list[Tensor]:
        """What the graph as it is now computes from the real tensors."""
        return list(Interpreter(GraphModule(nn.Module(), self.graph)).run(*self.values))

    def targets(self) -> list[Any]:
        """The operators, in order."""
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


@pytest.fixture
def joint() -> Joint:
    """An empty graph."""
    return Joint()
