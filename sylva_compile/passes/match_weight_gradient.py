"""Match the matrix products that make up a weight's gradient, for the passes of a trace and of training.

A weight gradient is a linear function of matrix products. A graph such as

    %mm   = aten.mm(aten.t(%gy), %x)            [m, T] x [T, n]
    %t    = aten.t(%mm)                         some layers transpose, some twice
    %cast = aten._to_copy(%t, float32)          autocast
    %sum  = aten.add(%cast, %other)             a weight used twice

becomes a flat list of terms, `gradient = Σ scale · (lhsᵀ · rhs)`, with operands `[T, m]` and `[T, n]` for T tokens.
The matcher walks from the gradient up to the products: a transpose swaps the operands, a cast is dropped (the sampled
product is float32 in any case), and a scalar factor is noted on the term.

The stacked weights `[E, m, n]` of experts have one product for all experts, each with tokens of its own. Three
operators make it: `aten._grouped_mm` of matrices, the fallback of transformers for float32, and, where all experts have
equally many tokens, `aten.bmm`. Their terms carry the offsets of the tokens, or say that the operands are batched.

The walk stops at any other operator, and at a dense gradient that another node reads too: this gradient exists in any
case, and sampling it is cheaper than a second product. Either becomes an opaque term, which gives the reason.
"""

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

aten = torch.ops.aten

_SAME_SHAPE = {
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
}
_RESHAPE = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SUM = {aten.add.Tensor, aten.sub.Tensor}
_SCALE = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class Operand:
    """A matrix in the graph, or, where `transposed`, the transpose of one."""

    node: Node
    transposed: bool = False

    def t(self) -> "Operand":
        """Return the transposed operand; the graph gets no new node."""
        return Operand(self.node, not self.transposed)

    def resolved(self) -> "Operand":
        """Return the same matrix as an operand whose node is no transpose: `transposed` counts those of the graph."""
        operand = self
        while is_transpose(operand.node):
            source = operand.node.args[0]
            assert isinstance(source, Node)
            operand = Operand(source, not operand.transposed)
        return operand


@dataclass(frozen=True)
class Scale:
    """A scalar operation of the dense gradient, `target(gradient, factor)`, to be applied to the sampled blocks."""

    target: torch._ops.OpOverload
    factor: Node | float | int | None = None


@dataclass(frozen=True)
class Term:
    """One summand of a gradient `[m, n]`: a product `lhsᵀ · rhs`, or an opaque matrix.

    Attributes:
        lhs: `[T, m]`, or the opaque matrix `[m, n]` itself.
        rhs: `[T, n]`, or None where the term is opaque.
        offsets: for experts, the node of `int[E]` that tells where the tokens of each end; None without experts.
        batched: whether the operands are `[E, T, m]` and `[E, T, n]`, with equally many tokens for each expert.
        scales: scalar operations on the summand, the outermost first.
        reason: why the term is opaque; None for a product.
    """

    lhs: Operand
    rhs: Operand | None
    scales: tuple[Scale, ...] = ()
    reason: str | None = None
    offsets: Node | None = None
    batched: bool = False


def is_transpose(node: Node) -> bool:
    """Return whether `node` transposes a matrix, or each matrix of a batch."""
    if node.op != "call_function":
        return False
    if node.target is aten.t.default:
        return True
    if node.target not in (aten.permute.default, aten.transpose.int):
        return False
    source, *axes = node.args
    dims = source.meta["val"].dim()  # type: ignore[union-attr]
    if dims not in (2, 3):
        return False
    if node.target is aten.transpose.int:
        return {axis % dims for axis in axes} == {dims - 2, dims - 1}
    return [axis % dims for axis in axes[0]] == [*range(dims - 2), dims - 1, dims - 2]  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Part:
    """A part of a gradient that the walk has still to follow: a node, whether it is transposed, and its scales."""

    node: Node
    transposed: bool = False
    scales: tuple[Scale, ...] = ()

    def source(self) -> "_Part":
        """Return the node that this one is made of, alike transposed and scaled."""
        return replace(self, node=_source(self.node))

    def scaled(self, scale: Scale) -> "_Part":
        """Return the same part with one more scale, the innermost."""
        return replace(self, scales=(*self.scales, scale))


def match_weight_gradient(gradient: Node) -> list[Term]:
    """Return the terms whose sum is the weight gradient `gradient [m, n]`, in the order of the sum."""
    terms: list[Term] = []
    # A loop, not a recursion: a layer that is used a thousand times has a chain of as many sums.
    waiting = [_Part(gradient)]
    while waiting:
        found = _follow(waiting.pop())
        if isinstance(found, Term):
            terms.append(found)
        else:
            waiting += reversed(found)
    return terms


def _follow(part: _Part) -> Term | list[_Part]:
    """Return the term that `part` is, or the parts whose sum it is."""
    node, target = part.node, part.node.target

    def opaque(reason: str) -> Term:
        return Term(Operand(node, part.transposed), None, part.scales, reason)

    if node.op != "call_function":
        return opaque(f"its gradient comes from outside the graph ({node.name})")
    if len(node.users) > 1:
        return opaque(f"its dense gradient is used elsewhere too ({node.name})")
    if is_transpose(node):
        return [replace(part.source(), transposed=not part.transposed)]
    if target in _SAME_SHAPE or (target in _RESHAPE and _same_shape(node)):
        return [part.source()]
    if target in _RESHAPE:
        product = _batch_of_one(node)
        if product is not None:
            return _product(*product, part)
    if target in _SUM and node.kwargs.get("alpha", 1) == 1 and _both_matrices(node):
        first, second = (replace(part, node=each) for each in node.args)  # type: ignore[arg-type]
        return [first, second.scaled(Scale(aten.neg.default)) if target is aten.sub.Tensor else second]
    if target is aten.neg.default:
        return [part.source().scaled(Scale(aten.neg.default))]
    if target in _SCALE and _is_scalar(node.args[1]):
        return [part.source().scaled(Scale(target, node.args[1]))]  # type: ignore[arg-type]
    if target is aten.mm.default or (target is aten.mul.Tensor and _is_outer_product(node)):
        return _product(*_factors(node), part)
    grouped = _grouped_product(node)
    if grouped is not None:
        return _product(*grouped[:2], part, offsets=grouped[2])
    if target is aten.bmm.default and node.meta["val"].dim() == 3:
        return _product(*_factors(node), part, batched=True)
    return opaque(f"its gradient is made by {target}, which blocks cannot be sampled through")


def _factors(node: Node) -> tuple[Operand, Operand]:
    left, right = node.args
    assert isinstance(left, Node) and isinstance(right, Node)
    return Operand(left), Operand(right)


def _product(
    left: Operand,
    right: Operand,
    part: _Part,
    *,
    offsets: Node | None = None,
    batched: bool = False,
) -> Term:
    """Return `left [m, T] · right [T, n]`, or its transpose, scaled as `part` is, as a term."""
    term = Term(left.t().resolved(), right.resolved(), part.scales, offsets=offsets, batched=batched)
    return replace(term, lhs=term.rhs, rhs=term.lhs) if part.transposed else term  # type: ignore[arg-type]


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _same_shape(node: Node) -> bool:
    return bool(node.meta["val"].shape == _source(node).meta["val"].shape)


def _both_matrices(node: Node) -> bool:
    shape = node.meta["val"].shape
    return all(isinstance(arg, Node) and arg.meta["val"].shape == shape for arg in node.args[:2])


def _is_scalar(value: object) -> bool:
    if isinstance(value, Node):
        held = value.meta.get("val")
        return isinstance(held, torch.Tensor) and held.dim() == 0
    return isinstance(value, int | float)


def _is_outer_product(node: Node) -> bool:
    """Return whether `node` multiplies `[m, 1]` by `[1, n]`: Inductor writes the product of one token in this way."""
    left, right = node.args
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return False
    first, second = left.meta["val"], right.meta["val"]
    return bool(first.dim() == second.dim() == 2 and first.shape[1] == 1 and second.shape[0] == 1)


def _grouped_product(node: Node) -> tuple[Operand, Operand, Node] | None:
    """Return `left [m, S]`, `right [S, n]` and the offsets where `node` is the product of each expert's tokens."""
    if node.target is aten._grouped_mm.default:
        left, right, offsets = (*node.args, None)[:3]
        is_plain = len(node.args) <= 3 and all(node.kwargs.get(name) is None for name in ("bias", "out_dtype"))
        offsets = node.kwargs.get("offs", offsets)
        if is_plain and all(isinstance(each, Node) for each in (left, right, offsets)):
            assert isinstance(left, Node) and isinstance(right, Node) and isinstance(offsets, Node)
            if left.meta["val"].dim() == right.meta["val"].dim() == 2:
                return Operand(left), Operand(right), offsets
        return None
    if node.target is not operator.getitem or node.args[1] != 1 or not is_grouped_backward(node.args[0]):
        return None
    activation, _, offsets, gradient = node.args[0].args  # type: ignore[union-attr]
    assert isinstance(activation, Node) and isinstance(offsets, Node) and isinstance(gradient, Node)
    return Operand(activation).t(), Operand(gradient), offsets


def is_grouped_backward(node: object) -> bool:
    """Return whether `node` computes both gradients of the grouped product that transformers falls back to."""
    # The operator exists only once transformers is imported.
    return isinstance(node, Node) and str(node.target) == "transformers.grouped_mm_fallback_backward.default"


def _batch_of_one(node: Node) -> tuple[Operand, Operand] | None:
    """Return a and b of `view(bmm(unsqueeze(a, 0), unsqueeze(b, 0)), [m, n])`, or None."""
    inner = _source(node)
    if inner.target is not aten.bmm.default or len(inner.users) > 1:
        return None
    if tuple(inner.meta["val"].shape) != (1, *node.meta["val"].shape):
        return None
    operands = []
    for arg in inner.args:
        assert isinstance(arg, Node)
        if arg.target is not aten.unsqueeze.default or arg.args[1] != 0:
            return None
        operands.append(Operand(_source(arg)))
    return operands[0], operands[1]
