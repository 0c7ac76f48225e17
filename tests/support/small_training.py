"""A training of a small bfloat16 model with blocks in any number of processes, made anew at will."""

from typing import Any

import fsspec  # noqa: F401 - torch's checkpoints load it
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.shards import whole
from sylva_compile.optim import AdamW, Muon
from sylva_compile.schedules import MovingBlocks

SEQUENCES = 8
HOW = ("ddp", "before", "after")
"""Under DistributedDataParallel; blocks embedded before `fully_shard`, which splits them; or after it."""


class Net(nn.Module):
    """Three weights with blocks, and a head that is trained whole.

    Blocks cross edges and the borders of shards, and the last weight has but two of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in ((40, 56), (56, 40), (40, 20)))
        self.to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.float())


def masks_of(model: nn.Module, seed: int = 0) -> Masks:
    torch.manual_seed(seed)
    maps = {}
    for number, (rows, columns, count) in enumerate(((4, 3, 7), (3, 4, 5), (2, 3, 2))):
        chosen = torch.zeros(rows * columns, dtype=torch.bool)
        chosen[torch.randperm(rows * columns)[:count]] = True
        maps[f"layers.{number}.weight"] = chosen.view(rows, columns)
    return Masks.from_block_maps(model, maps, 16)


def torch_adamw(masks: Masks, head: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": masks.parameters()}, {"params": head.parameters(), "lr": 1e-3}], lr=1e-2)


def adamw(masks: Masks, head: nn.Module) -> torch.optim.Optimizer:
    return AdamW([*masks.parameters(), *head.parameters()], lr=1e-2, max_grad_norm=1.0)


def muon(masks: Masks, head: nn.Module) -> torch.optim.Optimizer:
    return Muon([{"params": masks.parameters()}, {"params": head.parameters(), "rule": "adamw"}], lr=1e-2)


MAKE = {make.__name__: make for make in (adamw, torch_adamw, muon)}


class Training:
    """A training under `how`: one of `HOW`, or "alone" in one process.

    Learning rates fall. With `every`, blocks move.
    """

    def __init__(self, how: str, optimizer: str = "adamw", every: int = 0, masks_seed: int = 0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net, self.how = Net(), how
        masks = masks_of(self.net, masks_seed)
        if how != "after":
            masks.embed()
        self.model: nn.Module = self.net
        if how == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif how != "alone":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in self.net.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
        masks.embed()
        self.masks = masks
        self.optimizer = MAKE[optimizer](masks, self.net.head)
        self.rates = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, 10)
        self.schedules: list[Any] = [self.rates]
        if every:
            carry: Any = "none" if optimizer == "torch_adamw" else "intersection"
            self.schedules.append(MovingBlocks(masks, every=every, seed=3, carry=carry, optimizer=self.optimizer))
        self.steps = 0

    def blocks_state(self) -> Any:
        return sylva_compile.blocks_state(self.model, self.optimizer, self.schedules)

    def train(self, steps: int) -> None:
        rank, ranks = (0, 1) if self.how == "alone" else (dist.get_rank(), dist.get_world_size())
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            x = torch.randn(SEQUENCES, 40, generator=generator).chunk(ranks)[rank]
            self.model(x.to(torch.bfloat16)).square().mean().backward()
            self.optimizer.step()
            for schedule in self.schedules:
                schedule.step()
            self.optimizer.zero_grad()
            self.steps += 1

    @torch.no_grad()
    def evaluate(self) -> None:
        """Run the model without a backward pass, after which `fully_shard` keeps parameters gathered."""
        self.model(torch.ones(4, 40, dtype=torch.bfloat16))

    def snapshot(self) -> dict[str, Any]:
        """Return everything that a training changes, as whole tensors and plain values; all processes call it."""
        found: dict[str, Any] = {}
        for name, state in block_states(self.model).items():
            assert state.is_synced() and state.base_known
            found[f"{name} dense"] = whole(state.weight)
            found[f"{name} blocks"] = whole(state.blocks)
            found[f"{name} positions"] = state.mask.positions
            found[f"{name} places"] = state.originals.places
            found[f"{name} originals"] = state.originals.values
            assert self.masks[name] == state.mask
        found |= {f"head.{name}": whole(value) for name, value in self.net.head.named_parameters()}
        states = self.optimizer.state_dict()
        for number, values in states["state"].items():
            for name, value in values.items():
                found[f"state {number} {name}"] = whole(value).cpu() if isinstance(value, Tensor) else value
        for number, group in enumerate(states["param_groups"]):
            # torch adds the last one whenever a state dict is loaded.
            found |= {f"group {number} {name}": value for name, value in group.items() if name != "differentiable"}
        found |= {f"rates {name}": value for name, value in self.rates.state_dict().items()}
        for schedule in self.schedules[1:]:
            values = schedule.state_dict()
            found |= {f"schedule {name}": values[name] for name in ("steps", "moves", "generator")}
        # A copy: training goes on in place.
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}


def warm_up() -> None:
    """Load and generate what every training needs, before processes are forked; no backward pass, which starts threads.

    Autograd does not work in a fork of a process that has started its threads.
    """
    for name in MAKE:
        training = Training("alone", name, every=2)
        for parameter in (*training.masks.parameters(), *training.net.head.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        training.optimizer.step()
        training.blocks_state().state_dict()


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two snapshots are equal bit for bit."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value, (name, found[name], value)
