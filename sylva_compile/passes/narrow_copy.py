"""The columns of an activation that blocks need, made from the columns of what the activation is made of.

Before:

    %h        = aten.mul(aten.silu(%gate), %up)                  [T, n], pointwise
    %h_narrow = aten.index(%h, [None, %channels])

After:

    %h_narrow = aten.mul(aten.silu(aten.index(%gate, [None, %channels])), aten.index(%up, [None, %channels]))

Both are the same numbers. But a compiler that makes %h_narrow again in the backward pass may first make all of %h for
the former, at the very moment when memory is scarcest; the latter reads what is held anyway and makes k columns.
The way down ends at what is no pointwise operator, at what the backward holds, and where shapes are broadcast in
ways that rows of tokens do not follow.

Lines come in whole blocks of b unless the last block is cut short by the edge. All of the above is then done on
`[T, k/b, b]`, by blocks of channels: the b innermost elements lie side by side, and code generators load them as vectors.
"""

from collections.abc import Callable
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from sylva_compile.passes.edit import call, materialize
from sylva_compile.passes.match_weight_gradient import Operand

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
VIEWS = RESHAPES | {
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.alias.default,
    aten.detach.default,
}
CASTS = {torch.ops.prims.convert_element_type.default, aten._to_copy.default, aten.clone.default}
_SAME_ROWS = RESHAPES | {aten.alias.default, aten.detach.default}
DEPTH = 20
"""So many operators are followed at most."""


def is_pointwise(node: Node) -> bool:
    """Whether an element of the result depends on one element of each operand, and not on chance."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in CASTS


def narrow_copy(
    graph: Graph, activation: Operand, channels: Node, block_size: int, is_held: Callable[[Node], bool]
) -> Node:
    """Insert a copy of some columns of `activation`; returns its node, `[T, k]`.

    Args:
        graph: edited; the copy comes right after the activation and the channels.
        activation: `[T, n]`, transposed first where it must be.
        channels: `int64[k]`, the columns: of every `block_size` neighbours, counted from the first column, all or none.
        block_size: b.
        is_held: whether the backward holds all of a node, so that its columns cost nothing to get.
    """
    with graph.inserting_after(_later(activation.node, channels)):
        whole = materialize(graph, activation, like=activation.node)
    # In the order in which they are made, which inserting after one place would turn around.
    with graph.inserting_before(_later(whole, channels).next):
        return _Narrowing(graph, whole, channels, block_size, is_held).made()


class _Narrowing:
    """Copies of the columns `channels` of nodes with the rows of `whole`, `[T, n]`.

    They are `[T, k]`, or, where n is a multiple of b, `[T, k/b, b]` on the way.
    """

    def __init__(
        self, graph: Graph, whole: Node, channels: Node, block_size: int, is_held: Callable[[Node], bool]
    ) -> None:
        self._graph, self._whole, self._is_held = graph, whole, is_held
        self._rows, self._width = whole.meta["val"].shape
        self._made: dict[Node, Node] = {}
        self._index, self._columns = channels, [self._width]
        kept = channels.meta["val"].shape[0]
        # Of no channels at all, -1 would not say how many tokens there are.
        nothing = isinstance(kept, int) and kept == 0
        if block_size > 1 and isinstance(self._width, int) and self._width % block_size == 0 and not nothing:
            firsts = self._call(aten.slice.Tensor, channels, 0, 0, None, block_size)
            self._index = self._call(aten.div.Tensor_mode, firsts, block_size, kwargs={"rounding_mode": "floor"})
            self._columns = [self._width // block_size, block_size]

    def made(self) -> Node:
        """The copy of `whole`, `[T, k]`."""
        copy = self.of(self._whole, DEPTH)
        if len(self._columns) == 1:
            return copy
        blocks, block_size = copy.meta["val"].shape[1:]
        if isinstance(blocks, int):
            return self._call(aten.reshape.default, copy, [-1, blocks * block_size])
        # In a graph for masks of any size, a size is a node.
        size = self._call(aten.sym_size.int, copy, 1)
        return self._call(aten.reshape.default, copy, [-1, self._call(mul, size, block_size)])

    def of(self, node: Node, depth: int) -> Node:
        """Of a node with n columns and, all leading dimensions taken together, T rows."""
        while node.target in _SAME_ROWS and self._has_columns(node.all_input_nodes[0]):
            node = node.all_input_nodes[0]
        if node not in self._made:
            self._made[node] = self._through(node, depth) or self._cut(node)
        return self._made[node]

    def _through(self, node: Node, depth: int) -> Node | None:
        """The same operator on narrow operands, or None where that would be wrong or of no use."""
        if node.op != "call_function" or depth == 0 or not is_pointwise(node) or self._is_held(node):
            return None
        operands = {source: self._kind(source) for source in node.all_input_nodes}
        direct = [*node.args, *node.kwargs.values()]
        if None in operands.values() or not all(source in direct for source in operands):
            return None
        narrow = {source: self._operand(source, kind, depth - 1) for source, kind in operands.items()}
        args, kwargs = map_arg((node.args, node.kwargs), narrow.__getitem__)
        # A layout that four dimensions can have is none for two.
        return self._call(node.target, *args, kwargs={k: v for k, v in kwargs.items() if k != "memory_format"})

    def _kind(self, source: Node) -> str | None:
        """How an operand of a pointwise operator relates to rows and columns; None if in none of the simple ways."""
        value = source.meta["val"]
        if not isinstance(value, Tensor):
            return "number"
        if value.dim() == 0:
            return "number"
        if value.device != self._whole.meta["val"].device:
            # The index of the columns lies where the whole activation is.
            return None
        if self._has_columns(source):
            return "matrix"
        if _same(value.shape[-1], self._width) and value.dim() == 1:
            return "row"
        if _same(value.shape[-1], 1) and _same(_rows(value), self._rows):
            return "column"
        return None

    def _operand(self, source: Node, kind: str | None, depth: int) -> Node:
        if kind == "matrix":
            return self.of(source, depth)
        if kind == "row":
            return self._call(aten.index.Tensor, self._shaped(source, self._columns), [self._index])
        if kind == "column":
            return self._shaped(source, [-1, *[1] * len(self._columns)])
        return source

    def _cut(self, node: Node) -> Node:
        return self._call(aten.index.Tensor, self._shaped(node, [-1, *self._columns]), [None, self._index])

    def _shaped(self, node: Node, shape: list[Any]) -> Node:
        is_shaped = len(self._columns) == 1 and node.meta["val"].dim() == len(shape)
        return node if is_shaped else self._call(aten.reshape.default, node, shape)

    def _has_columns(self, node: Node) -> bool:
        value = node.meta["val"]
        return value.dim() > 1 and _same(value.shape[-1], self._width) and _same(_rows(value), self._rows)

    def _call(self, target: Any, *args: Any, kwargs: dict[str, Any] | None = None) -> Node:
        return call(self._graph, target, *args, like=self._whole, kwargs=kwargs)


def _rows(value: Tensor) -> int | torch.SymInt:
    return reduce(mul, value.shape[:-1], 1)


def _same(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes are equal whatever the symbols in them stand for; nothing is guarded."""
    sizes = [size if isinstance(size, int) else size.node.expr for size in (one, other)]
    return bool(sizes[0] == sizes[1])


def _later(first: Node, second: Node) -> Node:
    later = second if first < second else first
    # Inputs of the graph stay together in front.
    while later.op == "placeholder" and later.next.op == "placeholder":
        later = later.next
    return later
