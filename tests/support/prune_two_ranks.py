"""One of two processes that train pruned layers together: `python prune_two_ranks.py RANK DIRECTORY`."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import process_group

import sylva_compile
from sylva_compile import NMMasks
from sylva_compile.errors import EmbedError
from sylva_compile.schedules import MaskChange

STEPS = 3


class Net(nn.Module):
    """Two linear layers; Dynamo compiles no `forward` of torch's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu())
        return out


def model_and_masks() -> tuple[nn.Module, NMMasks, Tensor]:
    """Make a model, its masks and a batch of 8, equal on every rank."""
    torch.manual_seed(0)
    model = Net().double()
    return model, sylva_compile.prune_masks(model), torch.randn(8, 16, dtype=torch.float64)


def train(model: nn.Module, masks: NMMasks, batch: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Take a few steps, with a change of masks after each, and then a few with adapters."""
    schedule = MaskChange(masks, every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(2 * STEPS):
        if step == STEPS:
            generator = torch.Generator().manual_seed(5 if group is None else dist.get_rank() + 5)
            added = sylva_compile.add_low_rank(model, 3, generator=generator, process_group=group)
            optimizer.add_param_group({"params": added})
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        schedule.step()


def train_unseeded(rank: int, directory: str, group: dist.ProcessGroup) -> None:
    """Prune models that begin differently on each rank, with the group and without, and write what all see."""
    torch.manual_seed(rank)
    refused = Net()
    sylva_compile.prune_masks(refused).embed()
    with pytest.raises(EmbedError, match="process_group="):
        DistributedDataParallel(refused)
    model = Net().double()
    masks = sylva_compile.prune_masks(model, process_group=group)
    masks.embed()
    sylva_compile.add_low_rank(model, 3)
    wrapped = DistributedDataParallel(model)
    torch.nn.init.ones_(model.get_parameter("one.weight_right"))
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16).requires_grad_()
    out = wrapped(x)
    out.square().sum().backward()
    assert x.grad is not None
    places = masks.state_dict()
    torch.save([out.detach(), x.grad, model.state_dict(), places], f"{directory}/unseeded{rank}")
    for name, module in masks.modules().items():
        before = places[name]["second"]
        module._nm_layout.change(module.weight_values)
        assert torch.equal(before, module._nm_layout.second.cpu()), "C is of other values"


class Either(nn.Module):
    """One layer on the first rank and both on the other one, where `all` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.all = nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x)
        return self.two(out) if self.all or dist.get_rank() else out


def average_late_adapters(rank: int, group: dist.ProcessGroup) -> None:
    """Compare gradients of late adapters with the mean over ranks, also of layers that one rank leaves out."""
    torch.manual_seed(0)
    model = Either().double()
    sylva_compile.prune_masks(model).embed()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    added = sylva_compile.add_low_rank(model, 2, process_group=group)
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.5)
    torch.manual_seed(rank)
    for everything in (True, False, True, False):
        model.all = everything
        x = torch.randn(4, 8, dtype=torch.float64)
        own = torch.autograd.grad(model(x).square().sum(), added, allow_unused=True)
        wrapped(x).square().sum().backward()
        for parameter, gradient in zip(added, own, strict=True):
            mean = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            dist.all_reduce(mean, group=group)
            torch.testing.assert_close(parameter.grad, mean / 2)
        wrapped.zero_grad()


def average_adapters_once(rank: int, group: dist.ProcessGroup) -> None:
    """Compare gradients of adapters that had a group before DistributedDataParallel wrapped the model with the mean.

    With `gradient_as_bucket_view`, whoever averages them as well writes into the bucket that is being sent.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))).double()
    sylva_compile.prune_masks(model).embed()
    added = sylva_compile.add_low_rank(model, 32, process_group=group)
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.1)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    torch.manual_seed(rank)
    for _ in range(3):
        wrapped.zero_grad()
        x = torch.randn(8, 512, dtype=torch.float64)
        own = torch.autograd.grad(model(x).square().sum(), added)
        wrapped(x).square().sum().backward()
        for parameter, gradient in zip(added, own, strict=True):
            mean = gradient.clone()
            dist.all_reduce(mean, group=group)
            torch.testing.assert_close(parameter.grad, mean / 2)


def main(rank: int, directory: str, group: dist.ProcessGroup) -> None:
    train_unseeded(rank, directory, group)
    average_late_adapters(rank, group)
    average_adapters_once(rank, group)
    for how in ("eager", "compiled"):
        model, masks, batch = model_and_masks()
        backend = sylva_compile.backend(masks, inner="aot_eager")
        if how == "compiled":
            model.compile(backend=backend)
        train(DistributedDataParallel(model), masks, batch[rank::2], group)
        torch.save(model.state_dict(), f"{directory}/{how}{rank}")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[2]}/store") as world:
        main(int(sys.argv[1]), sys.argv[2], world)
