"""Which activations a sampled product reads whole, and which it reads through a narrow copy of the columns it needs.

Before:

    %blocks   = sylva.sddmm(%gy, %x, %positions, b)              in the backward half: all of %x is saved for it

After:

    %x_narrow = aten.index(%x, [None, %channels])                   in the forward half, once for all who need these channels,
                                                                 or what comes to the same (`narrow_copy.py`)
    %blocks   = sylva.sddmm(%gy, %x_narrow, %narrow_positions, b)

The narrow copy is an offer to the partitioner, which then weighs what the forward saves: the copy, or something from
which the backward makes it again for little (a norm's input, say). It is not made where it could win nothing:

* the activation is of the backward half itself: nothing is saved for it;
* the channels are more than `WIDE` of it, unless the backward can make it again: an activation that a product reads whole
  is saved whole, however little it takes to make, and a copy of it is not;
* the backward holds all of it anyway: something there reads it that is no pointwise operator (attention, another
  product), or that is one (a ReLU's) while nothing that is held allows to make the activation again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from sylva_compile.passes.edit import backward_half, tangent_dependents
from sylva_compile.passes.match_weight_gradient import Operand
from sylva_compile.passes.narrow_copy import CASTS, DEPTH, RESHAPES, VIEWS, is_pointwise, narrow_copy

WIDE = 0.9
"""Above this share of an activation, a narrow copy would be nearly the whole."""


@dataclass(frozen=True, eq=False)
class SampledProduct:
    """A sampled product that reads its activation whole.

    Attributes:
        product: the `sddmm` node.
        activation: its operand that is not a gradient, `[T, n]` once transposed.
        axis: which of its operands that is.
        channels, narrow_positions: what it needs of the activation, and its positions there.
        block_size: b; channels come in whole blocks of as many.
    """

    product: Node
    activation: Operand
    axis: int
    channels: Node
    narrow_positions: Node
    block_size: int


def unify_activations(samples: Sequence[SampledProduct]) -> list[SampledProduct]:
    """The samples, in their order, with equal views of one tensor as one activation: each layer makes its own."""
    first: dict[object, Node] = {}
    for node in sorted(sample.activation.node for sample in samples):
        first.setdefault(_value_key(node), node)
    return [
        replace(sample, activation=replace(sample.activation, node=first[_value_key(sample.activation.node)]))
        for sample in samples
    ]


def narrow_activations(graph: Graph, samples: Sequence[SampledProduct]) -> dict[SampledProduct, str]:
    """Let `samples` read narrow copies where that can win; returns the others, with the reason."""
    gradients = tangent_dependents(graph)
    backward = _Backward(backward_half(graph) - {sample.product for sample in samples})
    copies: dict[tuple[Operand, Node], Node] = {}
    whole: dict[SampledProduct, str] = {}
    reasons = {sample: _why_whole(sample, gradients, backward) for sample in samples}
    for sample, reason in reasons.items():
        if reason is not None:
            whole[sample] = reason
            if not sample.activation.transposed:
                sample.product.update_arg(sample.axis, sample.activation.node)
            continue
        key = (sample.activation, sample.channels)
        if key not in copies:
            copies[key] = narrow_copy(graph, *key, sample.block_size, backward.holds)
        sample.product.update_arg(sample.axis, copies[key])
        sample.product.update_arg(2, sample.narrow_positions)
    return whole


def _why_whole(sample: SampledProduct, gradients: set[Node], backward: "_Backward") -> str | None:
    activation = sample.activation
    if activation.node in gradients:
        return "it is made in the backward pass"
    root = activation.node
    while root.target in VIEWS:
        root = root.all_input_nodes[0]
    width = _size(activation.node.meta["val"].shape[0 if activation.transposed else 1])
    kept = _size(sample.channels.meta["val"].shape[0])
    if width is not None and kept is not None and kept > WIDE * width and not backward.can_make(root):
        return "the blocks need nearly all of its columns"
    keeper = backward.keeper(root)
    return f"{keeper.target} keeps it for the backward pass anyway" if keeper is not None else None


def _size(size: int | torch.SymInt) -> int | None:
    """The size, or that of the example where it may vary: the choice is one of speed alone, so nothing guards it."""
    hint = size if isinstance(size, int) else size.node.hint
    return None if hint is None else int(hint)


def _value_key(node: Node) -> object:
    """Equal for views that hold the same values in the same order."""
    if node.target not in VIEWS:
        return node
    source, *rest = node.args
    assert isinstance(source, Node)
    # The sizes of a reshape may be nodes of their own, one for each layer; their values tell.
    how = rest if node.target not in RESHAPES else tuple(node.meta["val"].shape)
    return node.target, str(how), _value_key(source)


class _Backward:
    """What the backward half of a joint graph holds, and what it can make of that."""

    def __init__(self, nodes: set[Node]) -> None:
        """Of its `nodes`, without the sampled products: what these hold is what is being decided."""
        self._nodes = nodes
        self._made: dict[tuple[Node, int], bool] = {}

    def keeper(self, root: Node) -> Node | None:
        """What makes it hold all of an activation, a view of `root`, whatever we do."""
        for reader in self._readers(root):
            if not is_pointwise(reader) or not self.can_make(root):
                return reader
        return None

    def holds(self, node: Node) -> bool:
        """Whether it reads all of `node` and must get it from the forward."""
        return any(self._readers(node)) and not self.can_make(node)

    def can_make(self, node: Node, depth: int = DEPTH) -> bool:
        """Whether it can make `node` again, pointwise, from what it holds anyway."""
        if node.op != "call_function" or depth == 0 or not (is_pointwise(node) or node.target in VIEWS | CASTS):
            return False
        if (node, depth) not in self._made:
            self._made[node, depth] = all(
                source.op == "placeholder" or any(self._readers(source)) or self.can_make(source, depth - 1)
                for source in node.all_input_nodes
            )
        return self._made[node, depth]

    def _readers(self, node: Node) -> Iterator[Node]:
        """Its nodes that read `node` or a view of it."""
        for user in node.users:
            if user.target in VIEWS:
                yield from self._readers(user)
            elif user in self._nodes:
                yield user
