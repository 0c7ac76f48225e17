"""Hierarchical sums of outer products, updated with a block of tokens at a time (Sylva, eqn 9-13, corrected).

Tokens z = [z1; z2] add `Z1ᵀ Z2` to a node's off-diagonal `B12 ≈ U Λ Vᵀ`. For one token the paper extends both bases by
the parts of z1 and z2 that lie outside of them, *each side by its own* (eqn 9, 10), rediagonalises the small core by an
SVD (eqn 11, the second term being an outer product, and eqn 12), rotates the bases and keeps the best r (eqn 13).

For a block of T tokens both bases would grow by T lines, and QR and SVD would cost more than the model itself. So:

*   V is extended by a few random mixtures of the tokens, less what V holds already (eqn 10). Fewer tokens than mixtures
    are spanned by them, and the update is then that of eqn 9-13 without loss.
*   The new left basis is the range of `B12' [V, v]`, `B12' = U Λ Vᵀ + Z1ᵀ Z2`: all that U and the tokens' left halves
    (eqn 9) answer to the right basis. This is one step of subspace iteration, started from what is known.
*   The core is `B12'` seen from that range, exact on the right side. Its SVD rediagonalises (eqn 12, 13).

Cutting to rank r after every batch, as the paper does, loses what only adds up over batches: on MiniLM the error was up
to 1.24 times the best possible one, though each cut was the best of its batch. Keeping 2r lines between batches and
cutting to r once, at the end, brings that below 1.1 (`tests/curvature/test_online.py` prints both).

A residual of zero, repeated tokens or none at all need no special case: bases come from Householder QR, which completes
a deficient range by lines that get Λ = 0.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, all_reduce, get_world_size

from sylva_compile.curvature.factor import Factor
from sylva_compile.curvature.hierarchy import Hierarchy, TreeLayout
from sylva_compile.curvature.update_queue import UpdateQueue

OVERSAMPLING = 2
"""Lines kept between batches, as a multiple of the rank."""

WHOLE_BLOCKS = 256
"""Up to this height a node's B12' is formed during an update: one wide product is quicker than four thin ones, and all
nodes of such a level together take `d·h/2` numbers, as much as the leaves of a large layer."""


class OnlineHierarchy(Factor):
    """`Σ z zᵀ` over tokens z [d] as a hierarchy.

    All nodes of a level go through one batched call, and with a queue those of all factors of one shape. The same
    updates in the same order give the same bits: the random mixtures depend on the number of the update alone, and what
    is updated together on the order and the shapes of all updates.
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
        """Zero.

        Args:
            size: d.
            depth: splits, K.
            rank: r of the result.
            kept: lines of U and V between batches; None: 2r.
            probes: mixtures of tokens that extend V in each update; None: r/2, 4 at least.
            dtype: of all that is kept and computed.
            device: likewise.
            queue: where tokens wait for those of other factors; None: every update is done at once.
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
        """All that is kept, in a fixed order and of fixed shapes; changing it in place changes the hierarchy."""
        self._settle()
        return [self.leaves, *self.bases, *self.values, self.updates]

    def copy(self) -> "OnlineHierarchy":
        """An independent hierarchy of the same sum, with the same queue."""
        self._settle()
        return copy.deepcopy(self, {id(self._queue): self._queue})

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Add `Zᵀ Z` for tokens Z `[T, d]`; with a queue, no later than the sum is read.

        Costs `2·T·d·s` operations for the leaves and for each level `4·T·d·c`, c = kept + probes, or `T·d·h` where
        nodes are small (see `WHOLE_BLOCKS`).
        """
        count = tokens.shape[0]
        if count == 0:
            return
        nbytes = self._update_bytes(count)
        if self._queue is not None and self._queue.make_room(self, nbytes, self.leaves.device):
            # What waits is our own: nobody keeps the tokens handed over from being freed or overwritten.
            waiting = self.layout.spread(tokens.to(self.leaves.dtype, copy=True), 1)
            self._queue.add(self, waiting, group=self._group(count), nbytes=nbytes)
        else:
            update_together([self], [self.layout.spread(tokens.to(self.leaves.dtype), 1)])

    @torch.no_grad()
    def merge(self, *others: "OnlineHierarchy") -> None:
        """Add the sums of `others`, of the same shape: `Σ U Λ Vᵀ`, rediagonalised together, in this order."""
        for one in (self, *others):
            one._settle()
        for other in others:
            self.leaves += other.leaves
        for level in range(self.layout.depth):
            self._merge_level(level, [(one.bases[level], one.values[level]) for one in (self, *others)])

    @torch.no_grad()
    def combine(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks of `group`, in the order of ranks, alike on each."""
        self._settle()
        all_reduce(self.leaves, group=group)
        for level in range(self.layout.depth):
            parts = zip(_gathered(self.bases[level], group), _gathered(self.values[level], group), strict=True)
            self._merge_level(level, list(parts))

    def _merge_level(self, level: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        roots = torch.cat([basis * lam.sqrt()[..., None, None, :] for basis, lam in parts], -1)
        _rediagonalise(self.bases[level], self.values[level], *roots.unbind(-3))

    def hierarchy(self) -> Hierarchy:
        """The sum so far, cut to rank r."""
        self._settle()
        # What completes a deficient range (Λ = 0) may lie in empty slots, which a hierarchy keeps at zero.
        real = self.layout.spread(self.leaves.new_ones(self.layout.size), 0)
        bases = [basis[..., : self.rank] * real.view(2**level, 2, -1, 1) for level, basis in enumerate(self.bases)]
        return Hierarchy(self.layout, self.leaves.clone(), bases, [lam[..., : self.rank] for lam in self.values])

    def mean(self, scale: Tensor) -> Hierarchy:
        """`scale · Σ z zᵀ`, cut to rank r, in float64."""
        return self.hierarchy().scaled(scale, torch.float64)

    def _settle(self) -> None:
        """Do the updates that wait."""
        if self._queue is not None:
            self._queue.flush()

    def _group(self, tokens: int) -> tuple[object, ...]:
        """Hierarchies that agree in this have the same shapes, and the same mixtures of so many tokens."""
        return self.layout, self._widest, self.probes, self.leaves.dtype, self.leaves.device, int(self.updates), tokens

    def _update_bytes(self, tokens: int) -> int:
        """Most bytes that an update together with others takes of each: tokens that wait, all side by side, the rest.

        Products of tokens and lines are formed where nodes are larger than `WHOLE_BLOCKS`, whole nodes where they are
        not, and about ten copies of the lines.
        """
        lines = self._widest + self.probes
        numbers = 2 * tokens + tokens * lines // (WHOLE_BLOCKS + 1) + WHOLE_BLOCKS + 10 * lines
        return self.layout.slots * numbers * self.leaves.itemsize

    @property
    def _widest(self) -> int:
        """Most lines that a level keeps."""
        return max((basis.shape[-1] for basis in self.bases), default=0)

    def _mixing(self, tokens: int) -> Tensor:
        """`[count, T]`, standard normal; drawn on the CPU so that every device mixes alike."""
        generator = torch.Generator().manual_seed(int(self.updates))
        mixing = torch.randn(self._widest + self.probes, tokens, generator=generator, dtype=torch.float32, device="cpu")
        return mixing.to(self.leaves.device, self.leaves.dtype)


@torch.no_grad()
def update_together(trees: Sequence[OnlineHierarchy], tokens: Sequence[Tensor]) -> None:
    """Add to each of N hierarchies that agree in `_group` the outer products of its tokens, `[T, P]` by slots.

    Side by side their slots are those of one forest, whose nodes go through the calls of a single tree. Only leaves,
    the bulk of what is kept, are added to where they lie.
    """
    first = trees[0]
    for tree, own in zip(trees, tokens, strict=True):
        lines = _by_node(own, tree.layout.leaves)
        tree.leaves.baddbmm_(lines.mT, lines)
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
    """`B12' = U Λ Vᵀ + Z1ᵀ Z2` of all nodes of a level, as something that multiplies thin matrices."""

    def __init__(self, basis: Tensor, lam: Tensor, first: Tensor, second: Tensor) -> None:
        """`basis [nodes, 2, h, q]`, `lam [nodes, q]`, Z1 and Z2 `[nodes, T, h]`."""
        (self.u, self.v), self.lam = basis.unbind(1), lam
        self.first, self.second = first, second
        h, tokens = self.u.shape[-2], first.shape[-2]
        self.whole: Tensor | None = None
        if h <= WHOLE_BLOCKS and h <= 4 * tokens:
            self.whole = ((self.u * lam[:, None]) @ self.v.mT).baddbmm_(first.mT, second)

    def times(self, right: Tensor) -> Tensor:
        """`B12' R` for R `[nodes, h, c]`."""
        if self.whole is not None:
            return self.whole @ right
        return self.u @ (self.lam[..., None] * (self.v.mT @ right)) + self.first.mT @ (self.second @ right)

    def transposed(self, left: Tensor) -> Tensor:
        """`B12'ᵀ L` for L `[nodes, h, c]`."""
        if self.whole is not None:
            return self.whole.mT @ left
        return self.v @ (self.lam[..., None] * (self.u.mT @ left)) + self.second.mT @ (self.first @ left)

    def range(self, probes: Tensor) -> Tensor:
        """An orthonormal basis of the range of B12', or of its chief part: `[nodes, h, c]`, c = min(q + p, h).

        Args:
            probes: mixtures of the lines of Z2, `[nodes, h, q + p]`: the last p extend V; the first ones take the
                place of lines that V does not use yet.
        """
        h, q = self.u.shape[-2:]
        if q == h:
            # Nothing is ever cut from a node this small, so any whole basis will do.
            return torch.eye(h, dtype=probes.dtype, device=probes.device).expand(*self.u.shape[:-2], h, h)
        used = (self.lam > torch.finfo(self.lam.dtype).eps * self.lam[..., :1])[..., None, :]
        probes = probes - self.v @ (used.mT * (self.v.mT @ probes))
        probes = F.normalize(probes, dim=-2, eps=torch.finfo(self.lam.dtype).tiny)
        right = torch.cat([torch.where(used, self.v, probes[..., :q]), probes[..., q:]], -1)
        basis: Tensor = torch.linalg.qr(self.times(right[..., :h])).Q
        return basis


def _by_node(lines: Tensor, nodes: int) -> Tensor:
    """`[T, nodes · h]` as `[nodes, T, h]`, a view."""
    grouped: Tensor = lines.unflatten(1, (nodes, -1)).transpose(0, 1)
    return grouped


def _rediagonalise(basis: Tensor, lam: Tensor, left: Tensor, right: Tensor, *, orthonormal: bool = False) -> None:
    """Write the best q terms of `L Rᵀ` into `basis [nodes, 2, h, q]` and `lam [nodes, q]` (eqn 12 and 13)."""
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
    """All in one along `axis`; the tensor itself where there is but one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _gathered(tensor: Tensor, group: ProcessGroup) -> list[Tensor]:
    """`tensor` of every rank, in order."""
    parts = [torch.empty_like(tensor) for _ in range(get_world_size(group))]
    all_gather(parts, tensor.contiguous(), group=group)
    return parts
