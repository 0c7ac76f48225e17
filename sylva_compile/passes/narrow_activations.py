"""Let sampled products read only the columns of an activation that their blocks need, where that saves memory.

Before:

    %blocks   = sylva.sddmm(%gy, %x, %positions, b)              in the backward half: all of %x is saved for it

After:

    %x_narrow = aten.index(%x, [None, %channels])                in the forward half, once for all products that need
                                                                 these channels, or an equal form (`narrow_copy.py`)
    %blocks   = sylva.sddmm(%gy, %x_narrow, %narrow_positions, b)

The partitioner then decides what the forward saves: the narrow copy, or a tensor from which the backward recomputes the
copy cheaply (a norm's input, say).

Refuses, and leaves the product with the whole activation, where a narrow copy cannot save memory:

* the activation depends on a gradient: the backward computes it, and the forward saves no part of it;
* the channels are more than `WIDE` of its columns, unless the backward can recompute it. A product that reads the whole
  activation makes the partitioner save it, however cheap it is to recompute; a product that reads a copy does not;
* the backward needs all of it in any case: an operator there that is not pointwise (attention, another product) reads
  it, or a pointwise one (a ReLU's derivative) does and the backward cannot recompute it from other saved tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from sylva_compile._torch import operator_of
from sylva_compile.kernels.block_norms import pool_squares
from sylva_compile.passes.dataflow import backward_half, dataflow_of, tangent_dependents
from sylva_compile.passes.match_weight_gradient import Operand
from sylva_compile.passes.narrow_copy import CASTS, DEPTH, RESHAPES, VIEWS, is_pointwise, narrow_copy

POOL = operator_of(pool_squares)
WIDE = 0.9
"""Share of an activation's columns above which a narrow copy saves too little memory."""


@dataclass(frozen=True, eq=False)
class SampledProduct:
    """A sampled product of a weight gradient, inserted with its whole activation as operand.

    Attributes:
        node: the `sddmm` node.
        activation: the operand that is not a gradient, `[T, n]` after its transpose.
        axis: index of that operand among the node's arguments, 0 or 1.
        channels: `int64[k]`, the columns of the activation that the blocks need.
        narrow_positions: `int64[2, nnz]`, the positions of the blocks once the activation has these columns alone.
        block_size: b; the channels come in whole blocks of b, or the last one is cut short by the edge.
    """

    node: Node
    activation: Operand
    axis: int
    channels: Node
    narrow_positions: Node
    block_size: int


def unify_activations(products: Sequence[SampledProduct]) -> list[SampledProduct]:
    """Return `products`, in their order, with one node for all equal views of a tensor: each layer makes its own."""
    first: dict[object, Node] = {}
    for activation in sorted(product.activation.node for product in products):
        first.setdefault(_value_key(activation), activation)
    return [
        replace(product, activation=replace(product.activation, node=first[_value_key(product.activation.node)]))
        for product in products
    ]


def narrow_activations(graph: Graph, products: Sequence[SampledProduct]) -> dict[SampledProduct, str]:
    """Let `products` read narrow copies where these can save memory.

    Args:
        graph: joint graph to rewrite in place.
        products: all its sampled products, each of which reads its whole activation.

    Returns:
        The products that still read their whole activation, each with the reason.
    """
    dataflow = dataflow_of(graph)
    gradients = tangent_dependents(dataflow)
    # The forward saves the pooled squares of a sketch, and not the activation, for which they are made.
    pooled = graph.find_nodes(op="call_function", target=POOL)
    backward = _Backward(backward_half(dataflow) - {product.node for product in products} - set(pooled))
    copies: dict[tuple[Operand, Node], Node] = {}
    whole_reasons: dict[SampledProduct, str] = {}
    reasons = {product: _why_whole(product, gradients, backward) for product in products}
    for product, reason in reasons.items():
        if reason is not None:
            whole_reasons[product] = reason
            if not product.activation.transposed:
                product.node.update_arg(product.axis, product.activation.node)
            continue
        key = (product.activation, product.channels)
        if key not in copies:
            copies[key] = narrow_copy(graph, *key, product.block_size, backward.saves)
        product.node.update_arg(product.axis, copies[key])
        product.node.update_arg(2, product.narrow_positions)
    return whole_reasons


def _why_whole(product: SampledProduct, gradients: set[Node], backward: "_Backward") -> str | None:
    """Return why `product` reads its whole activation, or None where it reads a narrow copy."""
    activation = product.activation
    if activation.node in gradients:
        return "it is made in the backward pass"
    root = activation.node
    while root.target in VIEWS:
        root = root.all_input_nodes[0]
    width = _size(activation.node.meta["val"].shape[0 if activation.transposed else 1])
    kept = _size(product.channels.meta["val"].shape[0])
    if width is not None and kept is not None and kept > WIDE * width and not backward.can_recompute(root):
        return "the blocks need nearly all of its columns"
    reader = backward.reader_of_all(root)
    return f"{reader.target} keeps it for the backward pass anyway" if reader is not None else None


def _size(size: int | torch.SymInt) -> int | None:
    """Return the size, or the example's where it may vary: it decides about speed alone, so it must add no guard."""
    hint = size if isinstance(size, int) else size.node.hint
    return None if hint is None else int(hint)


def _value_key(node: Node) -> object:
    """Return a key that is equal for views with the same values in the same order."""
    if node.target not in VIEWS:
        return node
    source, *rest = node.args
    assert isinstance(source, Node)
    # Each layer may compute the sizes of its reshape by nodes of its own, so the key holds their values instead.
    how = rest if node.target not in RESHAPES else tuple(node.meta["val"].shape)
    return node.target, str(how), _value_key(source)


class _Backward:
    """The backward half of a joint graph: the tensors that it must get from the forward, and those it can recompute."""

    def __init__(self, nodes: set[Node]) -> None:
        """`nodes`: the backward half without the sampled products, because the pass decides what these read."""
        self._nodes = nodes
        self._recomputable: dict[tuple[Node, int], bool] = {}

    def reader_of_all(self, root: Node) -> Node | None:
        """Return a backward node for which the forward saves all of `root` whatever the pass does, or None."""
        for reader in self._readers(root):
            if not is_pointwise(reader) or not self.can_recompute(root):
                return reader
        return None

    def saves(self, node: Node) -> bool:
        """Return whether the backward reads all of `node` and must get it from the forward."""
        return any(self._readers(node)) and not self.can_recompute(node)

    def can_recompute(self, node: Node, depth: int = DEPTH) -> bool:
        """Return whether pointwise operators make `node` again from tensors that the backward has in any case."""
        if node.op != "call_function" or depth == 0 or not (is_pointwise(node) or node.target in VIEWS | CASTS):
            return False
        if (node, depth) not in self._recomputable:
            self._recomputable[node, depth] = all(
                source.op == "placeholder" or any(self._readers(source)) or self.can_recompute(source, depth - 1)
                for source in node.all_input_nodes
            )
        return self._recomputable[node, depth]

    def _readers(self, node: Node) -> Iterator[Node]:
        """Yield the backward nodes that read `node` or a view of it."""
        for user in node.users:
            if user.target in VIEWS:
                yield from self._readers(user)
            elif user in self._nodes:
                yield user
