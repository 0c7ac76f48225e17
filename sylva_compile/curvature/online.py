"""Hierarchical sums of outer products, updated with a block of tokens at a time (Sylva, eqn 9-13, corrected).

Tokens z = [z1; z2] add `Z1ᵀ Z2` to a node's off-diagonal `B12 ≈ U Λ Vᵀ`. For one token the paper extends U by the
residual of z1 and V by the residual of z2, *each projected on its own side* (eqn 9, 10). It rediagonalises the small
core by an SVD (eqn 11, whose second term is an outer product, and eqn 12), rotates the bases and keeps the best r
columns (eqn 13).

For a block of T tokens both bases would grow by T columns, and QR and SVD would cost more than the model itself. So:

*   A few random mixtures v of the tokens' right halves, less their projection on V, extend V (eqn 10). If there are
    fewer tokens than mixtures, the mixtures span all tokens, and the update equals eqn 9-13 without loss.
*   The new left basis is the range of `B12' [V, v]`, with `B12' = U Λ Vᵀ + Z1ᵀ Z2`: the image of the right basis under
    U and the tokens' left halves (eqn 9). This is one step of subspace iteration, started from the known V.
*   The core is `B12'` projected on that range on the left, and exact on the right. Its SVD rediagonalises (eqn 12, 13).

Cutting to rank r after every batch, as the paper does, loses directions that grow large only over many batches: on
MiniLM the error was up to 1.24 times the best possible error, though each cut was the best of its batch. Keeping 2r
columns between batches and cutting to r once, at the end, brings that below 1.1 (`tests/curvature/test_online.py`
prints both).

A residual of zero, repeated tokens or an empty batch need no special case: bases come from Householder QR, which
completes a deficient range by columns that get Λ = 0.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce, get_world_size

from sylva_compile.curvature.factor import Factor
from sylva_compile.curvature.hierarchy import Hierarchy
from sylva_compile.curvature.tree_layout import TreeLayout
from sylva_compile.curvature.update_queue import UpdateQueue

OVERSAMPLING = 2
"""Columns of U and V kept between batches, as a multiple of the rank."""

WHOLE_BLOCKS = 256
"""Largest h at which an update forms a node's B12' as a whole: one wide product is quicker than four thin ones, and all
nodes of such a level together take `d·h/2` numbers, as much as the leaves of a large layer."""


class OnlineHierarchy(Factor):
    """`Σ z zᵀ` over tokens z [d] as a hierarchy.

    One batched call updates all nodes of a level, and with a queue the nodes of all factors of one shape. The same
    updates in the same order give the same bits: the random mixtures depend on the number of the update alone, and the
    grouping of factors on the order and the shapes of all updates.
    """

    def __init__(
        self,
        size: int,
        depth: int,
        rank: int,
        *,
        kept: int | None = None,
        probes: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        queue: "UpdateQueue[OnlineHierarchy] | None" = None,
    ) -> None:
        """Start with a sum of zero.

        Args:
            size: d.
            depth: K, the number of splits.
            rank: r of the result.
            kept: q, columns of U and V kept between batches; None: 2r.
            probes: p, mixtures of tokens that extend V in each update; None: r/2, 4 at least.
            dtype: dtype of all tensors and computations.
            device: device of all tensors and computations.
            queue: joins updates of several factors; None: every update is done at once.
        """
        self.layout, self.rank = TreeLayout(size, depth), rank
        kept = OVERSAMPLING * rank if kept is None else kept
        self.probes = max(4, rank // 2) if probes is None else probes
        self._queue = queue
        s = self.layout.leaf_size

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.leaves = zeros(self.layout.leaves, s, s)
        self.bases: list[Tensor] = []
        self.values: list[Tensor] = []
        for level in range(depth):
            h = self.layout.half(level)
            q = min(kept, h)
            self.bases.append(zeros(2**level, 2, h, q))
            self.values.append(zeros(2**level, q))
        self.updates = torch.zeros((), dtype=torch.int64, device="cpu")

    def state(self) -> list[Tensor]:
        """Return every tensor kept, in a fixed order and of fixed shapes; writing to one changes the hierarchy."""
        self._settle()
        return [self.leaves, *self.bases, *self.values, self.updates]

    def copy(self) -> "OnlineHierarchy":
        """Return an independent hierarchy with the same sum and the same queue."""
        self._settle()
        return copy.deepcopy(self, {id(self._queue): self._queue})

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for tokens Z `[T, d]`; with a queue, at the latest before the sum is read.

        Costs `2·T·d·s` operations for the leaves and for each level `4·T·d·c`, c = kept + probes, or `T·d·h` if nodes
        are small (see `WHOLE_BLOCKS`).
        """
        count = tokens.shape[0]
        if count == 0:
            return
        nbytes = self._update_bytes(count)
        if self._queue is not None and self._queue.make_room(self, nbytes, self.leaves.device):
            # Queue a copy: the caller may free or overwrite its tokens before the queue is flushed.
            waiting = self.layout.spread(tokens.to(self.leaves.dtype, copy=True), 1)
            self._queue.add(self, waiting, group=self._group(count), nbytes=nbytes)
        else:
            update_together([self], [self.layout.spread(tokens.to(self.leaves.dtype), 1)])

    @torch.no_grad()
    def merge(self, *others: "OnlineHierarchy") -> None:
        """Add the sums of `others`, of the same shape: rediagonalise `Σ U Λ Vᵀ` over all of them, in this order."""
        for one in (self, *others):
            one._settle()
        for other in others:
            self.leaves += other.leaves
        for level in range(self.layout.depth):
            self._merge_level(level, [(one.bases[level], one.values[level]) for one in (self, *others)])

    @torch.no_grad()
    def combine(self, group: ProcessGroup) -> None:
        """Replace the sum by its total over all ranks of `group`, added in the order of ranks, the same on each."""
        self._settle()
        all_reduce(self.leaves, group=group)
        for level in range(self.layout.depth):
            parts = zip(_gathered(self.bases[level], group), _gathered(self.values[level], group), strict=True)
            self._merge_level(level, list(parts))

    def _merge_level(self, level: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        roots = torch.cat([basis * lam.sqrt()[..., None, None, :] for basis, lam in parts], -1)
        _rediagonalise(self.bases[level], self.values[level], *roots.unbind(-3))

    def hierarchy(self) -> Hierarchy:
        """Return the sum so far, cut to rank r."""
        self._settle()
        # Columns that complete a deficient range (Λ = 0) may lie in empty slots, which a hierarchy keeps at zero.
        real = self.layout.spread(self.leaves.new_ones(self.layout.size), 0)
        bases = [basis[..., : self.rank] * real.view(2**level, 2, -1, 1) for level, basis in enumerate(self.bases)]
        return Hierarchy(self.layout, self.leaves.clone(), bases, [lam[..., : self.rank] for lam in self.values])

    def mean(self, scale: Tensor) -> Hierarchy:
        """Return `scale · Σ z zᵀ`, cut to rank r, in float64."""
        return self.hierarchy().scaled(scale, torch.float64)

    def _settle(self) -> None:
        """Do the updates that wait in the queue."""
        if self._queue is not None:
            self._queue.flush()

    def _group(self, tokens: int) -> tuple[object, ...]:
        """Return a key; hierarchies with equal keys have the same shapes and draw the same mixtures of T = `tokens`."""
        return self.layout, self._widest, self.probes, self.leaves.dtype, self.leaves.device, int(self.updates), tokens

    def _update_bytes(self, tokens: int) -> int:
        """Return the most bytes that one hierarchy takes in a joint update of T = `tokens` tokens.

        They hold the waiting tokens, their copy side by side with others', the products of tokens and columns in nodes
        larger than `WHOLE_BLOCKS`, the whole B12' of smaller nodes, and about ten copies of the columns.
        """
        columns = self._widest + self.probes
        numbers = 2 * tokens + tokens * columns // (WHOLE_BLOCKS + 1) + WHOLE_BLOCKS + 10 * columns
        return self.layout.slots * numbers * self.leaves.itemsize

    @property
    def _widest(self) -> int:
        """Most columns that any level keeps."""
        return max((basis.shape[-1] for basis in self.bases), default=0)

    def _mixing(self, tokens: int) -> Tensor:
        """Return standard normal mixing weights `[q + p, T]`, drawn on the CPU so that every device gets the same."""
        generator = torch.Generator().manual_seed(int(self.updates))
        mixing = torch.randn(self._widest + self.probes, tokens, generator=generator, dtype=torch.float32, device="cpu")
        return mixing.to(self.leaves.device, self.leaves.dtype)


@torch.no_grad()
def update_together(trees: Sequence[OnlineHierarchy], tokens: Sequence[Tensor]) -> None:
    """Add to each of several hierarchies the outer products of its own tokens, `[T, P]`, spread over the slots.

    All hierarchies have an equal `_group`. For each level, their nodes are joined and go through the calls of a single
    tree. Only the leaves, which take most of the memory, are updated in place, one hierarchy after another.
    """
    first = trees[0]
    for tree, own in zip(trees, tokens, strict=True):
        by_leaf = _by_node(own, tree.layout.leaves)
        tree.leaves.baddbmm_(by_leaf.mT, by_leaf)
    spread = _joined(tokens, 1)
    mixtures = first._mixing(spread.shape[0]) @ spread
    for level in range(first.layout.depth):
        bases, values = [tree.bases[level] for tree in trees], [tree.values[level] for tree in trees]
        basis, lam = _joined(bases, 0), _joined(values, 0)
        halves = _by_node(spread, 2 * len(lam)).unflatten(0, (-1, 2))
        term = _Sum(basis, lam, *halves.unbind(1))
        probes = _by_node(mixtures, 2 * len(lam)).unflatten(0, (-1, 2)).select(1, 1).mT
        left = term.range(probes[..., : basis.shape[-1] + first.probes])
        _rediagonalise(basis, lam, left, term.transposed(left), orthonormal=True)
        if len(trees) > 1:
            torch._foreach_copy_(bases, basis.split(2**level))
            torch._foreach_copy_(values, lam.split(2**level))
    for tree in trees:
        tree.updates += 1


class _Sum:
    """`B12' = U Λ Vᵀ + Z1ᵀ Z2` of all nodes of a level, as a linear operator for products with thin matrices."""

    def __init__(self, basis: Tensor, lam: Tensor, first: Tensor, second: Tensor) -> None:
        """Keep U and V `basis [nodes, 2, h, q]`, Λ `lam [nodes, q]`, Z1 `first [nodes, T, h]`, and Z2 `second`."""
        (self.u, self.v), self.lam = basis.unbind(1), lam
        self.first, self.second = first, second
        h, tokens = self.u.shape[-2], first.shape[-2]
        self.whole: Tensor | None = None
        if h <= WHOLE_BLOCKS and h <= 4 * tokens:
            self.whole = ((self.u * lam[:, None]) @ self.v.mT).baddbmm_(first.mT, second)

    def times(self, right: Tensor) -> Tensor:
        """Return `B12' R` for R `[nodes, h, c]`."""
        if self.whole is not None:
            return self.whole @ right
        return self.u @ (self.lam[..., None] * (self.v.mT @ right)) + self.first.mT @ (self.second @ right)

    def transposed(self, left: Tensor) -> Tensor:
        """Return `B12'ᵀ L` for L `[nodes, h, c]`."""
        if self.whole is not None:
            return self.whole.mT @ left
        return self.v @ (self.lam[..., None] * (self.u.mT @ left)) + self.second.mT @ (self.first @ left)

    def range(self, probes: Tensor) -> Tensor:
        """Return an orthonormal basis of the range of B12', or of its main part: `[nodes, h, c]`, c = min(q + p, h).

        Args:
            probes: mixtures of the rows of Z2 as columns, `[nodes, h, q + p]`: the last p extend V; the first q replace
                the columns of V that are not used yet (Λ = 0).
        """
        h, q = self.u.shape[-2:]
        if q == h:
            # A node this small keeps all its columns, so any complete basis serves.
            return torch.eye(h, dtype=probes.dtype, device=probes.device).expand(*self.u.shape[:-2], h, h)
        used = (self.lam > torch.finfo(self.lam.dtype).eps * self.lam[..., :1])[..., None, :]
        probes = probes - self.v @ (used.mT * (self.v.mT @ probes))
        probes = F.normalize(probes, dim=-2, eps=torch.finfo(self.lam.dtype).tiny)
        right = torch.cat([torch.where(used, self.v, probes[..., :q]), probes[..., q:]], -1)
        basis: Tensor = torch.linalg.qr(self.times(right[..., :h])).Q
        return basis


def _by_node(matrix: Tensor, nodes: int) -> Tensor:
    """Return a view of `matrix [T, nodes · h]` as `[nodes, T, h]`."""
    grouped: Tensor = matrix.unflatten(1, (nodes, -1)).transpose(0, 1)
    return grouped


def _rediagonalise(basis: Tensor, lam: Tensor, left: Tensor, right: Tensor, *, orthonormal: bool = False) -> None:
    """Write the best q terms of `L Rᵀ` into `basis [nodes, 2, h, q]` and `lam [nodes, q]` (eqn 12 and 13).

    L = `left` and R = `right` are `[nodes, h, c]`; `orthonormal` says that the columns of L are.
    """
    q = lam.shape[-1]
    second = torch.linalg.qr(right)
    core = second.R.mT
    if not orthonormal:
        first = torch.linalg.qr(left)
        left, core = first.Q, first.R @ core
    rotate_left, values, rotate_right = torch.linalg.svd(core, full_matrices=False)
    basis.select(-3, 0).copy_(left @ rotate_left[..., :q])
    basis.select(-3, 1).copy_(second.Q @ rotate_right.mT[..., :q])
    lam.copy_(values[..., :q])


def _joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Return `tensors` concatenated along `axis`; a single tensor is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _gathered(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Return `tensor` of every rank of `group`, in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(get_world_size(group))]
    all_gather(parts, tensor.contiguous(), group=group)
    return parts
