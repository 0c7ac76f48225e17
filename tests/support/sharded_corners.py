"""One of two processes that train a small model under `fully_shard`: `python sharded_corners.py RANK DIRECTORY`.

Every process also trains a twin alone, on the joint batches, and compares.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.shards import whole
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import EmbedError
from sylva_compile.optim import AdamW, Muon
from sylva_compile.schedules import LayerSchedule, MovingBlocks

STEPS = 3


class Layer(nn.Module):
    """Blocks of 16 cross the edges of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), nn.Linear(56, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(4)), nn.LayerNorm(40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Training:
    """A model with blocks. `how`: "alone", or embedded "before" or "after" `fully_shard`.

    `sharded`: "layers", the "root" alone, or "blocks", where dense weights are ignored.
    """

    def __init__(self, how: str, sharded: str = "layers") -> None:
        torch.manual_seed(0)
        self.model = Model().requires_grad_(False)
        self.masks = sylva_compile.trace_and_mask(self.model, method="random", sparsity=0.6, block_size=16)
        self.alone = how == "alone"
        if how != "after":
            self.masks.embed()
        if not self.alone:
            dense = {p for name, p in self.model.named_parameters() if name in self.masks}
            ignored = {"ignored_params": dense} if sharded == "blocks" else {}
            self.sharded = [*(() if sharded == "root" else self.model.layers), self.model]
            for module in self.sharded:
                fully_shard(module, **ignored)
        self.masks.embed()

    def batch(self, number: int) -> Tensor:
        joint = torch.randn(8, 5, 40, generator=torch.Generator().manual_seed(number))
        return joint if self.alone else joint.chunk(dist.get_world_size())[dist.get_rank()]

    def train(self, optimizer: torch.optim.Optimizer, after: Callable[[], Any] = int) -> None:
        for step in range(STEPS):
            self.model(self.batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            after()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return the loss of a batch; `fully_shard` keeps the parameters of the root gathered afterwards."""
        loss: Tensor = self.model(torch.ones(2, 5, 40))
        return loss

    def values(self) -> list[Tensor]:
        states = block_states(self.model).values()
        assert all(state.is_synced() for state in states)
        return [whole(tensor).clone() for state in states for tensor in (state.weight, state.blocks)]


def sgd(masks: Masks, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(masks.parameters(), lr=lr)


def adamw(masks: Masks) -> torch.optim.Optimizer:
    return AdamW(masks.parameters(), lr=1e-2, eps=1e-6)


def muon(masks: Masks) -> torch.optim.Optimizer:
    return Muon(masks.parameters(), lr=1e-2, adjust_lr_fn="original")


def assert_near(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6)


def dense_weights_that_are_ignored(directory: Path) -> None:
    """Blocks are split then, and every process holds the weights."""
    for make in (sgd, adamw, muon):
        alone, sharded = Training("alone"), Training("before", "blocks")
        for each in (alone, sharded):
            each.train(make(each.masks))
        assert_near(sharded.values(), alone.values())
    own = directory / f"adapter of {dist.get_rank()}"
    sylva_compile.save_adapter(sharded.model, own)
    assert own.exists() == (dist.get_rank() == 0), "more than the first process has written"


def moves_of_blocks_beside_ignored_weights() -> None:
    sharded = Training("before", "blocks")
    optimizer = adamw(sharded.masks)
    sharded.train(optimizer, MovingBlocks(sharded.masks, every=1, choose="gradient", temperature=0.0).step)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, sharded.values())
    assert all(map(torch.equal, *everyone))
    with pytest.raises(EmbedError, match="different places"):
        MovingBlocks(sharded.masks, every=1, seed=dist.get_rank()).step()


def after_an_evaluation(how: str) -> None:
    """The root is gathered still when blocks are edited, stepped, moved, and switched off."""
    pair = Training("alone"), Training(how, "root")
    for each in pair:
        each.evaluate()
        with torch.no_grad():
            each.masks.parameters()[0].mul_(3.0)
    torch.testing.assert_close(pair[0].evaluate(), pair[1].evaluate())
    assert_near(pair[1].values(), pair[0].values())
    for each in pair:
        optimizer = sgd(each.masks)
        schedule = MovingBlocks(each.masks, every=1)
        each.model(each.batch(0)).backward()
        each.evaluate()
        optimizer.step()
        schedule.step()
        each.evaluate()
    assert_near(pair[1].values(), pair[0].values())


def layers_that_are_drawn(how: str) -> None:
    pair = Training("alone"), Training(how, "root")
    for each in pair:
        optimizer, schedule = adamw(each.masks), LayerSchedule(each.masks, "random", fraction=0.5, seed=1)

        def after(training: Training = each, schedule: LayerSchedule = schedule) -> None:
            training.evaluate()
            schedule.step()

        each.train(optimizer, after)
    assert_near(pair[1].values(), pair[0].values())


def after_a_pass_that_failed(how: str) -> None:
    alone, sharded = Training("alone"), Training(how)
    x = sharded.batch(0).requires_grad_()

    def fail(gradient: Tensor) -> None:
        raise ValueError("the end of the pass")

    x.register_hook(fail)
    with pytest.raises(ValueError, match="the end"):
        sharded.model(x).backward()
    sharded.model.zero_grad()
    if not hasattr(sharded.model, "reset_iter_state"):
        return  # torch 2.11 cannot go on
    sharded.model.reset_iter_state()
    for each in (alone, sharded):
        each.train(sgd(each.masks))
    assert_near(sharded.values(), alone.values())


def gradients_that_are_summed(how: str) -> None:
    alone, sharded = Training("alone"), Training(how)
    for module in sharded.sharded:
        # Gloo has no operation that multiplies first.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    alone.train(sgd(alone.masks, 0.5 * dist.get_world_size()))
    sharded.train(sgd(sharded.masks))
    assert_near(sharded.values(), alone.values())


def moves_by_a_trace(how: str) -> None:
    config = SylvaConfig(num_samples=16, method="kfac", score="gain", progress=False)
    pair = Training("alone"), Training(how)
    for each in pair:
        loader = [each.batch(number) for number in range(2)]
        options: dict[str, Any] = {"loader": loader, "loss_fn": lambda model, batch: model(batch), "config": config}
        schedule = MovingBlocks(each.masks, every=2, choose="gain", temperature=0.0, **options)
        each.train(sgd(each.masks), schedule.step)
    assert dict(pair[0].masks) == dict(pair[1].masks)
    assert_near(pair[1].values(), pair[0].values())


def adapters_with_other_tensors(directory: Path, how: str) -> None:
    """Of two adapters, each has other blocks, and a norm of its own."""
    if dist.get_rank() == 0:
        for name, sparsity in (("first", 0.6), ("second", 0.8)):
            model = Training("alone").model
            sylva_compile.unload_adapter(model)
            sylva_compile.trace_and_mask(model, method="random", sparsity=sparsity, block_size=16).embed()
            with torch.no_grad():
                model.norm.weight.fill_(sparsity)
            sylva_compile.save_adapter(model, directory / how / name, modules_to_save=["norm"])
    dist.barrier()
    pair = Training("alone"), Training(how)
    for each in pair:
        sylva_compile.unload_adapter(each.model)
        for name in ("first", "second"):
            sylva_compile.load_adapter(each.model, directory / how / name, name)
    for name in ("second", "first", "second"):
        for each in pair:
            each.masks = sylva_compile.set_adapter(each.model, name)
            each.train(sgd(each.masks))
        assert_near(pair[1].values(), pair[0].values())
        assert torch.equal(whole(pair[1].model.norm.weight), pair[0].model.norm.weight)


def files_of_others(directory: Path) -> None:
    """The first process that holds a part writes what all export and upload, also where it is not the very first."""
    sharded = Training("before")
    sylva_compile.unload_adapter(sharded.model)
    sylva_compile.trace_and_mask(sharded.model, method="random", sparsity=0.95, block_size=16).embed()
    sylva_compile.export_peft(sharded.model, directory / f"export of {dist.get_rank()}")
    assert (directory / f"export of {dist.get_rank()}").exists() == (dist.get_rank() == 0)
    uploaded = []
    with pytest.MonkeyPatch.context() as patch:
        api = SimpleNamespace(
            create_repo=lambda *_, **__: SimpleNamespace(repo_id="user/name"),
            file_exists=lambda *_, **__: True,
            upload_folder=lambda **given: uploaded.append(given) or SimpleNamespace(commit_url="a commit"),
        )
        patch.setattr("huggingface_hub.HfApi", lambda **_: api)
        assert sylva_compile.push_to_hub(sharded.model, "user/name") == "a commit"
    assert len(uploaded) == (dist.get_rank() == 0), "a process without files has deleted those of another"
    stage = Training("alone")
    fully_shard(stage.model, mesh=DeviceMesh("cpu", [dist.get_rank()]))
    sylva_compile.save_adapter(stage.model, directory / f"stage {dist.get_rank()}")
    assert (directory / f"stage {dist.get_rank()}").exists()


def main(directory: Path) -> None:
    files_of_others(directory)
    dense_weights_that_are_ignored(directory)
    moves_of_blocks_beside_ignored_weights()
    for how in ("before", "after"):
        after_an_evaluation(how)
        layers_that_are_drawn(how)
        after_a_pass_that_failed(how)
        gradients_that_are_summed(how)
        moves_by_a_trace(how)
        adapters_with_other_tensors(directory, how)
    print("all near", flush=True)


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), str(Path(sys.argv[2]) / "store")):
        main(Path(sys.argv[2]))
