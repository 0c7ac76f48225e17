"""One of several processes that train every case under DistributedDataParallel: `ddp_ranks.py RANK RANKS DIRECTORY`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import assert_invariant
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks
from sylva_compile.errors import EmbedError
from sylva_compile.schedules import LayerSchedule

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def ours(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return sylva_compile.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def zero(inner: Any, *, views: bool = True) -> Optimizer:
    """Return a maker of an optimizer whose states are spread over the ranks; alone, it is `inner`."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = {"lr": 1e-3, "weight_decay": 0.1}
        if not dist.is_initialized():
            made: torch.optim.Optimizer = inner(parameters, **settings)
            return made
        return ZeroRedundancyOptimizer(parameters, inner, parameters_as_bucket_view=views, **settings)

    return make


@dataclass(frozen=True)
class Case:
    """One training. `compiled`: "no", "in place", "layers", "inside" or "outside" of the wrapper."""

    compiled: str = "no"
    wrapper: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = sgd
    dtype: torch.dtype = torch.float32
    micro_batches: int = 1
    hook: str = "all_reduce"
    inner: str = "aot_eager"
    schedule: str | None = None
    within: float = 1e-8

    @property
    def steps(self) -> int:
        """PowerSGD sends whole gradients in the first two steps."""
        return 4 if self.hook == "power_sgd" else 3


CASES = {
    "uncompiled": Case(),
    "compiled, then wrapped": Case("inside"),
    "wrapped, then compiled": Case("outside"),
    "wrapped, then compiled, in several buckets": Case("outside", {"bucket_cap_mb": 0.01}),
    "wrapped, then compiled in place": Case("in place"),
    "by layer": Case("layers"),
    "by layer, Inductor": Case("layers", inner="inductor"),
    "static graph": Case("inside", {"static_graph": True}),
    "unused parameters": Case("inside", {"find_unused_parameters": True}),
    "bucket views": Case("layers", {"gradient_as_bucket_view": True}),
    "no_sync": Case("layers", micro_batches=2),
    "AdamW": Case("layers", optimizer=adamw, within=1e-5),
    "our AdamW": Case("layers", {"gradient_as_bucket_view": True}, optimizer=ours, within=1e-5),
    "AdamW, no_sync": Case("layers", optimizer=adamw, micro_batches=2, within=1e-5),
    "bfloat16": Case("layers", dtype=torch.bfloat16, within=2e-5),
    "fp16 hook": Case("layers", hook="fp16", within=1e-4),
    "PowerSGD": Case("layers", hook="power_sgd", within=2e-2),
    "ZeRO, torch's AdamW": Case("layers", optimizer=zero(torch.optim.AdamW), within=1e-5),
    "ZeRO, our AdamW": Case("layers", optimizer=zero(sylva_compile.AdamW), within=1e-5),
    "ZeRO, our AdamW, no views": Case("layers", optimizer=zero(sylva_compile.AdamW, views=False), within=1e-5),
    "gate": Case("inside", optimizer=adamw, schedule="gate", within=1e-5),
    "gate, wrapped, then compiled, views": Case(
        "outside", {"gradient_as_bucket_view": True}, optimizer=ours, schedule="gate", within=1e-5
    ),
    "gate, static graph": Case("inside", {"static_graph": True}, optimizer=ours, schedule="gate", within=1e-5),
    "toggle": Case("layers", {"find_unused_parameters": True}, optimizer=adamw, schedule="toggle", within=1e-5),
}


def cases_of(ranks: int) -> dict[str, Case]:
    """Return the cases that so many ranks train: all with two; with more, those whose arithmetic differs then."""
    differ = ("uncompiled", "by layer", "AdamW, no_sync", "bfloat16", "fp16 hook", "ZeRO, our AdamW", "gate")
    return CASES if ranks == 2 else {name: CASES[name] for name in differ}


class Layer(nn.Module):
    """Blocks of 16 cross the edges of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), nn.Linear(56, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def model_and_masks(dtype: torch.dtype = torch.float32) -> tuple[Model, Masks]:
    """Make a model, equal on every rank."""
    torch.manual_seed(0)
    model = Model(3).requires_grad_(False)
    for parameter in model.parameters():
        # Below 1/16, so that the spacing of float32 is 3.7e-9 at most.
        parameter.uniform_(-0.06, 0.06)
    return model.to(dtype), sylva_compile.trace_and_mask(model, method="random", sparsity=0.7, block_size=16)


def batch(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """Return this rank's share of twelve sequences."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, 40, generator=generator).to(dtype)[rank::ranks]


def prepare(case: Case, model: Model, masks: Masks, *, wrap: bool) -> tuple[nn.Module, Any]:
    """Embed, compile and wrap in the order of the case; without `wrap`, compile alone."""
    backend = sylva_compile.backend(masks, inner=case.inner, on_miss="error")  # type: ignore[arg-type]
    run: nn.Module = model
    if case.compiled == "layers":
        sylva_compile.compile_layers(model, backend)
    if case.compiled == "inside":
        model.compile(backend=backend)
    if wrap:
        run = DistributedDataParallel(model, **case.wrapper)
    if case.compiled == "in place":
        model.compile(backend=backend)
    if case.compiled == "outside":
        return torch.compile(run, backend=backend), backend  # type: ignore[return-value]
    return run, backend


def train(case: Case, x: Tensor, *, wrap: bool) -> dict[str, Any]:
    """Train; return the weights, the blocks, and the bytes that each step has sent."""
    torch._dynamo.reset()
    model, masks = model_and_masks(case.dtype)
    # Buckets that split a graph must not be smaller than the first one.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096 if case.wrapper.get("bucket_cap_mb") else 1024 * 1024
    run, backend = prepare(case, model, masks, wrap=wrap)
    sent = [0]
    ddp: Any = getattr(run, "_orig_mod", run)
    if wrap:
        ddp.register_comm_hook(*_hook(case.hook, sent))
    optimizer = case.optimizer(masks.parameters())
    schedule = None
    if case.schedule is not None:
        schedule = LayerSchedule(masks, "random", fraction=0.4, seed=1, mechanism=case.schedule)  # type: ignore[arg-type]
    bytes_sent, start = [], masks.parameters()[0].detach().clone()
    for _ in range(case.steps):
        sent[0] = 0
        parts = x.chunk(case.micro_batches)
        for at, part in enumerate(parts):
            if wrap:
                ddp.require_backward_grad_sync = at == len(parts) - 1
            (run(part) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        bytes_sent.append(sent[0])
    assert_invariant(model, masks)
    # Dynamo sees a layer that is closed by "toggle" as a frozen one.
    assert case.compiled == "no" or case.schedule == "toggle" or backend.report().rewritten == len(masks), str(
        backend.report()
    )
    return {
        "weights": dict(model.state_dict()),
        "blocks": {name: blocks.detach() for name, blocks in zip(masks, masks.parameters(), strict=True)},
        "bytes": bytes_sent,
        "moved": (masks.parameters()[0] - start).abs().max().item(),
    }


def _hook(name: str, sent: list[int]) -> tuple[Any, Callable[[Any, dist.GradBucket], Any]]:
    """Return a state and a communication hook that adds the bytes of each bucket to `sent`."""
    if name == "power_sgd":
        options = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 2, "min_compression_rate": 1}
        state, inner = powerSGD_hook.PowerSGDState(None, **options), powerSGD_hook.powerSGD_hook
    else:
        state, inner = (
            None,
            {"all_reduce": default_hooks.allreduce_hook, "fp16": default_hooks.fp16_compress_hook}[name],
        )

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent[0] += bucket.buffer().nbytes
        return inner(state, bucket)  # type: ignore[no-any-return]

    return state, hook


def refuse_other_places(rank: int) -> None:
    """Blocks in other places on each rank are refused, before anything is sent into them."""
    model, _ = model_and_masks()
    torch.manual_seed(rank)
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=16)
    masks.embed()
    before = [blocks.detach().clone() for blocks in masks.parameters()]
    with pytest.raises(EmbedError, match="in different places"):
        DistributedDataParallel(model)
    assert all(torch.equal(blocks, was) for blocks, was in zip(masks.parameters(), before, strict=True))


def follow_the_first_base(rank: int, directory: str) -> None:
    """The wrapper gives the weights of the first process to all, and their base with them, in checkpoints as well."""
    torch.manual_seed(rank)
    model = Model(2).requires_grad_(False)
    torch.manual_seed(0)
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.7, block_size=16)
    masks.embed()
    base = [weight.clone() for weight in model.state_dict().values()]
    dist.broadcast_object_list(base)
    run = DistributedDataParallel(model)
    optimizer = ours(masks.parameters())
    run(batch(rank, dist.get_world_size(), torch.float32)).backward()
    optimizer.step()
    state = {"blocks": sylva_compile.blocks_state(run, optimizer)}
    dcp.save(state, checkpoint_id=f"{directory}/first base")
    dcp.load(state, checkpoint_id=f"{directory}/first base")
    with sylva_compile.disable_adapter(model):
        assert all(map(torch.equal, model.state_dict().values(), base))


def main(rank: int, ranks: int, directory: str) -> None:
    refuse_other_places(rank)
    follow_the_first_base(rank, directory)
    for name, case in cases_of(ranks).items():
        torch.save(train(case, batch(rank, ranks, case.dtype), wrap=True), f"{directory}/{name}{rank}")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[3]}/store", int(sys.argv[2])):
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
