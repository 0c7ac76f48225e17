"""Make a copy of some columns of an activation from the same columns of its operands.

Before:

    %h        = aten.mul(aten.silu(%gate), %up)                  [T, n], pointwise
    %h_narrow = aten.index(%h, [None, %channels])

After:

    %h_narrow = aten.mul(aten.silu(aten.index(%gate, [None, %channels])), aten.index(%up, [None, %channels]))

Both give the same numbers. But where the backward pass recomputes the first form, the compiler may compute all of %h at
the very moment of the highest memory use; the second form reads tensors that are saved in any case and computes k
columns.

Refuses to follow an operand further, and selects its columns by `aten.index`: an operator that is not pointwise; a node
that the backward saves in any case; operands broadcast in another way than as rows, columns or numbers.

Channels come in whole blocks of b, unless the last block is cut short by the edge. Where all blocks are whole, the pass
works on `[T, n/b, b]` and selects blocks of channels: the b innermost elements are contiguous, and generated code loads
them as vectors.
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
"""Number of operators that are followed at most, from the activation to a leaf."""


def is_pointwise(node: Node) -> bool:
    """Return whether each element of the result depends on one element of each operand and on no random numbers."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in CASTS


def narrow_copy(
    graph: Graph, activation: Operand, channels: Node, block_size: int, is_saved: Callable[[Node], bool]
) -> Node:
    """Insert a copy of some columns of `activation` and return its node, `[T, k]`.

    Args:
        graph: graph to edit; the copy comes right after the activation and the channels.
        activation: `[T, n]` after its transpose.
        channels: `int64[k]`, the columns, in whole blocks: they hold all or none of the columns `[i·b, (i+1)·b)`.
        block_size: b.
        is_saved: tells whether the forward saves all of a node in any case, so that its columns take no more memory.
    """
    with graph.inserting_after(_later(activation.node, channels)):
        matrix = materialize(graph, activation, like=activation.node)
    # Nodes inserted before one place stay in the order in which they are made; after one place, they end up reversed.
    with graph.inserting_before(_later(matrix, channels).next):
        return _ColumnCopier(graph, matrix, channels, block_size, is_saved).copy_of_activation()


class _ColumnCopier:
    """Makes copies of the columns `channels` of an activation `[T, n]` and of the nodes that it is computed from.

    A copy is `[T, k]`, or `[T, k/b, b]` where b divides n; `_column_shape` is `[n]` or `[n/b, b]` accordingly, and
    `_selected` holds the indices along its first dimension: channels, or blocks of channels.
    """

    def __init__(
        self, graph: Graph, activation: Node, channels: Node, block_size: int, is_saved: Callable[[Node], bool]
    ) -> None:
        self._graph, self._activation, self._is_saved = graph, activation, is_saved
        self._rows, self._width = activation.meta["val"].shape
        self._copies: dict[Node, Node] = {}
        self._selected, self._column_shape = channels, [self._width]
        kept = channels.meta["val"].shape[0]
        # A reshape of zero elements to [-1, …] cannot infer the number of tokens.
        is_empty = isinstance(kept, int) and kept == 0
        if block_size > 1 and isinstance(self._width, int) and self._width % block_size == 0 and not is_empty:
            firsts = self._call(aten.slice.Tensor, channels, 0, 0, None, block_size)
            self._selected = self._call(aten.div.Tensor_mode, firsts, block_size, kwargs={"rounding_mode": "floor"})
            self._column_shape = [self._width // block_size, block_size]

    def copy_of_activation(self) -> Node:
        """Return the copy of the activation, `[T, k]`."""
        copy = self._copy_of(self._activation, DEPTH)
        if len(self._column_shape) == 1:
            return copy
        blocks, block_size = copy.meta["val"].shape[1:]
        if isinstance(blocks, int):
            return self._call(aten.reshape.default, copy, [-1, blocks * block_size])
        # A graph that serves masks of any size computes the size by a node.
        size = self._call(aten.sym_size.int, copy, 1)
        return self._call(aten.reshape.default, copy, [-1, self._call(mul, size, block_size)])

    def _copy_of(self, node: Node, depth: int) -> Node:
        """Return the copy of `node`, which has n columns and, over all its leading dimensions, T rows."""
        while node.target in _SAME_ROWS and self._has_rows_and_columns(node.all_input_nodes[0]):
            node = node.all_input_nodes[0]
        if node not in self._copies:
            self._copies[node] = self._recompute(node, depth) or self._select(node)
        return self._copies[node]

    def _recompute(self, node: Node, depth: int) -> Node | None:
        """Apply the operator of `node` to copies of its operands; return None where that is wrong or saves nothing."""
        if node.op != "call_function" or depth == 0 or not is_pointwise(node) or self._is_saved(node):
            return None
        operands = {source: self._kind(source) for source in node.all_input_nodes}
        direct = [*node.args, *node.kwargs.values()]
        if None in operands.values() or not all(source in direct for source in operands):
            return None
        narrow = {source: self._operand(source, kind, depth - 1) for source, kind in operands.items()}
        args, kwargs = map_arg((node.args, node.kwargs), narrow.__getitem__)
        # A memory format of four dimensions, such as channels_last, does not apply to the copy.
        return self._call(node.target, *args, kwargs={k: v for k, v in kwargs.items() if k != "memory_format"})

    def _kind(self, source: Node) -> str | None:
        """Return how an operand is broadcast over rows and columns, or None where it is in no way handled here.

        "matrix" has all rows and columns, "row" the columns, "column" the rows, and "number" neither.
        """
        value = source.meta["val"]
        if not isinstance(value, Tensor):
            return "number"
        if value.dim() == 0:
            return "number"
        if value.device != self._activation.meta["val"].device:
            # The indices of the columns are on the device of the activation.
            return None
        if self._has_rows_and_columns(source):
            return "matrix"
        if _same(value.shape[-1], self._width) and value.dim() == 1:
            return "row"
        if _same(value.shape[-1], 1) and _same(_rows(value), self._rows):
            return "column"
        return None

    def _operand(self, source: Node, kind: str | None, depth: int) -> Node:
        """Return `source`, an operand of that kind, for an operator on copies."""
        if kind == "matrix":
            return self._copy_of(source, depth)
        if kind == "row":
            return self._call(aten.index.Tensor, self._reshape(source, self._column_shape), [self._selected])
        if kind == "column":
            return self._reshape(source, [-1, *[1] * len(self._column_shape)])
        return source

    def _select(self, node: Node) -> Node:
        return self._call(aten.index.Tensor, self._reshape(node, [-1, *self._column_shape]), [None, self._selected])

    def _reshape(self, node: Node, shape: list[Any]) -> Node:
        """Return `node` in `shape`; without blocks of columns, a node of as many dimensions has it already."""
        has_shape = len(self._column_shape) == 1 and node.meta["val"].dim() == len(shape)
        return node if has_shape else self._call(aten.reshape.default, node, shape)

    def _has_rows_and_columns(self, node: Node) -> bool:
        value = node.meta["val"]
        return value.dim() > 1 and _same(value.shape[-1], self._width) and _same(_rows(value), self._rows)

    def _call(self, target: Any, *args: Any, kwargs: dict[str, Any] | None = None) -> Node:
        return call(self._graph, target, *args, like=self._activation, kwargs=kwargs)


def _rows(value: Tensor) -> int | torch.SymInt:
    return reduce(mul, value.shape[:-1], 1)


def _same(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Return whether two sizes are equal for every value of the symbols in them; this adds no guard."""
    sizes = [size if isinstance(size, int) else size.node.expr for size in (one, other)]
    return bool(sizes[0] == sizes[1])


def _later(first: Node, second: Node) -> Node:
    """Return the later one of two nodes, or the last placeholder where both are placeholders."""
    later = second if first < second else first
    # A new node must not stand between the placeholders of the graph.
    while later.op == "placeholder" and later.next.op == "placeholder":
        later = later.next
    return later
