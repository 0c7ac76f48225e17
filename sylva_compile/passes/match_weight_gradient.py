"""The one matcher of both stages: which products make up a weight's gradient.

A weight gradient is a linear function of matrix products. Seen from the end,

    %mm   = aten.mm(aten.t(%gy), %x)            [m, T] x [T, n]
    %t    = aten.t(%mm)                         some layers, twice
    %cast = aten._to_copy(%t, float32)          autocast
    %sum  = aten.add(%cast, %other)             a weight used twice

becomes a flat list of terms, `gradient = Σ scale · (lhsᵀ · rhs)`, each term with token-major operands `[T, m]` and
`[T, n]`. Transposes swap the operands, casts vanish (the sampled product is float32 anyway), scalar factors are kept
with the term.

What is not such a product stays an opaque term, with the reason: another operator, or a dense gradient that somebody
else reads too (then it exists anyway, and sampling from it is cheaper than a second product).
"""

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
    """A matrix in the graph; `transposed` says that its transpose is meant."""

    node: Node
    transposed: bool = False

    def t(self) -> "Operand":
        """The transpose, found rather than computed."""
        return Operand(self.node, not self.transposed)

    def resolved(self) -> "Operand":
        """Without the transposes that the graph itself applies to the node."""
        operand = self
        while is_transpose(operand.node):
            source = operand.node.args[0]
            assert isinstance(source, Node)
            operand = Operand(source, not operand.transposed)
        return operand


@dataclass(frozen=True)
class Scale:
    """`target(blocks, factor)`, applied to the sampled blocks as it was to the dense gradient."""

    target: torch._ops.OpOverload
    factor: Node | float | int | None = None


@dataclass(frozen=True)
class Term:
    """One summand of a gradient.

    A product `lhsᵀ · rhs` of token-major operands, or, where `reason` is set, the opaque matrix `lhs` itself.
    """

    lhs: Operand
    rhs: Operand | None
    scales: tuple[Scale, ...] = ()
    reason: str | None = None


def is_transpose(node: Node) -> bool:
    """Whether `node` transposes a matrix."""
    if node.op != "call_function":
        return False
    if node.target is aten.t.default:
        return True
    if node.target is aten.permute.default:
        return [int(d) % 2 for d in node.args[1]] == [1, 0] and len(node.args[1]) == 2  # type: ignore[union-attr, arg-type]
    if node.target is aten.transpose.int:
        return node.args[0].meta["val"].dim() == 2 and node.args[1] % 2 != node.args[2] % 2  # type: ignore[union-attr, operator]
    return False


def match_weight_gradient(gradient: Node) -> list[Term]:
    """The terms of the weight gradient that `gradient [m, n]` holds; `lhs` of a product is `[T, m]`, `rhs` `[T, n]`."""
    return _terms(gradient, transposed=False, scales=(), root=True)


def _terms(node: Node, *, transposed: bool, scales: tuple[Scale, ...], root: bool = False) -> list[Term]:
    def opaque(reason: str) -> list[Term]:
        return [Term(Operand(node, transposed), None, scales, reason)]

    if node.op != "call_function":
        return opaque(f"its gradient comes from outside the graph ({node.name})")
    if len(node.users) > 1:
        return opaque(f"its dense gradient is used elsewhere too ({node.name})")
    target = node.target
    if is_transpose(node):
        return _terms(_source(node), transposed=not transposed, scales=scales)
    if target in _SAME_SHAPE or (target in _RESHAPE and _same_shape(node)):
        return _terms(_source(node), transposed=transposed, scales=scales)
    if target in _RESHAPE:
        product = _batch_of_one(node)
        if product is not None:
            return [_product(*product, transposed, scales)]
    if target in _SUM and node.kwargs.get("alpha", 1) == 1 and _both_matrices(node):
        first, second = node.args
        assert isinstance(first, Node) and isinstance(second, Node)
        negated = (*scales, Scale(aten.neg.default)) if target is aten.sub.Tensor else scales
        return [
            *_terms(first, transposed=transposed, scales=scales),
            *_terms(second, transposed=transposed, scales=negated),
        ]
    if target is aten.neg.default:
        return _terms(_source(node), transposed=transposed, scales=(*scales, Scale(aten.neg.default)))
    if target in _SCALE and _is_scalar(node.args[1]):
        scale = Scale(target, node.args[1])  # type: ignore[arg-type]
        return _terms(_source(node), transposed=transposed, scales=(*scales, scale))
    if target is aten.mm.default:
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        return [_product(Operand(left), Operand(right), transposed, scales)]
    if target is aten.mul.Tensor and _is_outer_product(node):
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        return [_product(Operand(left), Operand(right), transposed, scales)]
    return opaque(f"its gradient is made by {target}, which blocks cannot be sampled through")


def _product(left: Operand, right: Operand, transposed: bool, scales: tuple[Scale, ...]) -> Term:
    """`left [m, T] · right [T, n]` as a term with token-major operands."""
    term = Term(left.t().resolved(), right.resolved(), scales)
    return replace(term, lhs=term.rhs, rhs=term.lhs) if transposed else term  # type: ignore[arg-type]


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
    """Inductor writes the product of `[m, 1]` and `[1, n]` (one token) as a broadcast multiplication."""
    left, right = node.args
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return False
    first, second = left.meta["val"], right.meta["val"]
    return bool(first.dim() == second.dim() == 2 and first.shape[1] == 1 and second.shape[0] == 1)


def _batch_of_one(node: Node) -> tuple[Operand, Operand] | None:
    """`view(bmm(unsqueeze(a, 0), unsqueeze(b, 0)), [m, n])`, as `einsum` writes a product, is `a · b`."""
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
