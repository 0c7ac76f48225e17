"""The curvature of stacked experts by dense loops in float64: the slow twin of `curvature.expert_kfac`."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

F64 = torch.float64

Tokens = list[tuple[Tensor, Tensor]]
"""For each expert its inputs `[T_e, n]` and output gradients `[T_e, m]`."""


class _Record(TorchFunctionMode):
    """Notes inputs and outputs of each product with a slice of a stacked weight."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self.stacks = {weight.untyped_storage().data_ptr(): (name, weight) for name, weight in stacks.items()}
        self.products: list[tuple[str, int, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (linear, Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.bmm):
            x, weight = args[:2]
            name, stack = self.stacks.get(weight.untyped_storage().data_ptr(), ("", None))
            if stack is not None:
                out.retain_grad()
                first = weight.storage_offset() // stack[0].numel()
                for at in range(len(stack) if func is torch.bmm else 1):
                    self.products.append((name, first + at, x[at] if func is torch.bmm else x, out))
        return out


def routed(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], loss_of: Callable[[nn.Module, Any], Tensor]
) -> dict[str, list[Tokens]]:
    """Return the live tokens of each expert of the stacked weights `names`, batch by batch.

    The copy that runs is in float64 and takes one expert after another. `loss_of` gives the loss summed over sequences.
    """
    model = copy.deepcopy(model).double().eval()
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
    stacks = {name: model.get_parameter(name) for name in names}
    found: dict[str, list[Tokens]] = {name: [] for name in stacks}
    for batch in batches:
        with _Record(stacks) as record:
            loss = loss_of(model, batch)
        loss.backward()
        for name, stack in stacks.items():
            tokens: Tokens = [(torch.empty(0), torch.empty(0))] * len(stack)
            for whose, expert, x, out in record.products:
                if whose == name:
                    gy = out.grad[expert] if out.dim() == 3 else out.grad
                    tokens[expert] = (x.detach(), gy)
            largest = max(float(gy.abs().max()) for _, gy in tokens if gy.numel())
            found[name].append([_live(x, gy, largest) if len(x) else (x, gy) for x, gy in tokens])
    return found


def _live(x: Tensor, gy: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    kept = [t for t in range(len(x)) if float(gy[t].abs().max()) > 1e-6 * largest and bool(x[t].any())]
    return x[kept], gy[kept]


class Twin:
    """A, and G, Γ and scores of every expert, token by token; `batches` as `routed` gives them."""

    def __init__(self, batches: list[Tokens], m: int, n: int, block_size: int) -> None:
        self.m, self.n, self.b, self.batches = m, n, block_size, batches
        experts = len(batches[0])
        self.tokens = [sum(len(batch[e][0]) for batch in batches) for e in range(experts)]
        self.a = torch.zeros(n, n, dtype=F64)
        self.g = [torch.zeros(m, m, dtype=F64) for _ in range(experts)]
        self.gradient = [torch.zeros(m, n, dtype=F64) for _ in range(experts)]
        for batch in batches:
            for e, (inputs, gradients) in enumerate(batch):
                for x, gy in zip(inputs.double(), gradients.double(), strict=True):
                    self.a += torch.outer(x, x) / sum(self.tokens)
                    self.g[e] += torch.outer(gy, gy) / self.tokens[e]
                    self.gradient[e] += torch.outer(gy, x) / (self.tokens[e] + block_size)

    def tiles(self) -> list[tuple[int, int, slice, slice]]:
        b = self.b
        rows, columns = range(-(-self.m // b)), range(-(-self.n // b))
        return [(r, c, slice(r * b, (r + 1) * b), slice(c * b, (c + 1) * b)) for r in rows for c in columns]

    def grid(self, value: Callable[[int, slice, slice], float]) -> Tensor:
        """Return `value(expert, rows, columns)` of every block, `[E·ceil(m/b), ceil(n/b)]`; zero without tokens."""
        out = torch.zeros(len(self.tokens), -(-self.m // self.b), -(-self.n // self.b), dtype=F64)
        for e, tokens in enumerate(self.tokens):
            for r, c, rows, columns in self.tiles() if tokens else ():
                out[e, r, c] = value(e, rows, columns)
        return out.flatten(0, 1)

    def gains(self, damping: float = 0.1) -> Tensor:
        def gain(e: int, rows: slice, columns: slice) -> float:
            curvature = torch.kron(damped(self.g[e], damping)[rows, rows], damped(self.a, damping)[columns, columns])
            own = self.gradient[e][rows, columns].flatten()
            return self.tokens[e] * 0.5 * float(own @ torch.linalg.solve(curvature, own))

        return self.grid(gain)

    def papers(self, damping: float = 1e-3) -> Tensor:
        share = [tokens / sum(self.tokens) for tokens in self.tokens]
        a_inverse = torch.linalg.inv(damped(self.a, damping)).diagonal()
        outputs, inputs = [], []
        for e, tokens in enumerate(self.tokens):
            gradient = self.gradient[e]
            g_inverse = torch.linalg.inv(damped(self.g[e], damping)).diagonal() if tokens else torch.ones(self.m)
            outputs.append(share[e] * (gradient @ self.a @ gradient.t()).diagonal() / g_inverse)
            inputs.append(share[e] * (gradient.t() @ self.g[e] @ gradient).diagonal() / a_inverse)
        return self.grid(lambda e, rows, columns: float(torch.outer(outputs[e][rows], inputs[e][columns]).sum()))

    def squares(self) -> Tensor:
        sums = [torch.zeros(self.m, self.n, dtype=F64) for _ in self.tokens]
        for batch in self.batches:
            for e, (x, gy) in enumerate(batch):
                if len(x):
                    sums[e] += (gy.double().t() @ x.double()).square()
        return self.grid(lambda e, rows, columns: float(sums[e][rows, columns].sum()))

    def greedy(self, count: int, experts: Iterable[int] | None = None, damping: float = 0.1) -> Tensor:
        """Choose block by block, over all `experts`, on `wᵀ c + ½ wᵀ (G_e ⊗ A) w`, written out for each expert."""
        chosen = self.grid(lambda *block: 0.0).bool().unflatten(0, (len(self.tokens), -1))
        experts = list(range(len(self.tokens)) if experts is None else experts)
        places = {
            (r, c): torch.arange(self.m * self.n).view(self.m, self.n)[rows, columns].flatten()
            for r, c, rows, columns in self.tiles()
        }
        curvature = {e: torch.kron(damped(self.g[e], damping), damped(self.a, damping)) for e in experts}
        left = {e: self.gradient[e].flatten() for e in experts}
        for _ in range(count):
            steps = {
                (e, *place): torch.linalg.solve(curvature[e][index[:, None], index], left[e][index])
                for e in experts
                if self.tokens[e]
                for place, index in places.items()
                if not chosen[(e, *place)]
            }
            if not steps:
                first = next(at for at in chosen.logical_not().nonzero().tolist() if at[0] in experts)
                chosen[tuple(first)] = True
                continue

            def gain(at: tuple[int, int, int], steps: dict[tuple[int, int, int], Tensor] = steps) -> float:
                return self.tokens[at[0]] * float(left[at[0]][places[at[1:]]] @ steps[at])

            best = max(steps, key=gain)
            chosen[best] = True
            e, index = best[0], places[best[1:]]
            left[e] = left[e] - curvature[e][:, index] @ steps[best]
        return chosen.flatten(0, 1)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return `matrix` with a fraction of its mean diagonal added to the diagonal."""
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=F64)
