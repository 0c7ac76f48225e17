"""DistributedDataParallel averages the values of pruned weights, and adapters that come after it."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import two_ranks
from prune_two_ranks import model_and_masks, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils._pytree import tree_flatten

import sylva_compile
from sylva_compile.errors import EmbedError, ScopeError
from sylva_compile.nm import averaging


def test_two_ranks_train_like_one(tmp_path: Path) -> None:
    two_ranks.run("prune_two_ranks.py", tmp_path)
    assert_trees_equal(*(torch.load(tmp_path / f"unseeded{rank}") for rank in (0, 1)))
    model, masks, batch = model_and_masks()
    train(model, masks, batch)
    for how in ("eager", "compiled"):
        first, second = (torch.load(tmp_path / f"{how}{rank}") for rank in (0, 1))
        for name, value in model.state_dict().items():
            assert torch.equal(first[name], second[name]), f"{how}: ranks differ in {name}"
            torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11)


def assert_trees_equal(one: Any, other: Any) -> None:
    leaves, structure = tree_flatten(one)
    others, other_structure = tree_flatten(other)
    assert structure == other_structure
    for left, right in zip(leaves, others, strict=True):
        assert torch.equal(left, right)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Make a process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_pruned_after_wrapping_are_refused(compiled: bool) -> None:
    model, masks, batch = model_and_masks()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(EmbedError, match="then wrap"):
        masks.embed(wrapped)
    masks.embed()
    if compiled:
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
    with pytest.raises(EmbedError, match=r"one\.weight: DistributedDataParallel wrapped the model before"):
        wrapped(batch)


@pytest.mark.usefixtures("alone")
def test_weights_that_are_split_are_refused_at_once() -> None:
    model, masks, _ = model_and_masks()
    masks.embed()
    with pytest.raises(EmbedError, match=r"one\.weight is pruned and cannot be split"):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model, _, _ = model_and_masks()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ScopeError, match=r"one\.weight is split over processes"):
        sylva_compile.prune_masks(model)
    model, masks, batch = model_and_masks()
    masks.embed()
    wanted = model(batch)
    for use_orig_params in (False, True):
        with pytest.raises(EmbedError, match=r"one\.weight is pruned and cannot be split"):
            FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        assert torch.equal(model(batch), wanted)


@pytest.mark.usefixtures("alone")
def test_a_wrapper_takes_over_adapters_that_had_a_group() -> None:
    model, masks, batch = model_and_masks()
    masks.embed()
    added = sylva_compile.add_low_rank(model, 2, process_group=dist.group.WORLD)
    assert all(parameter in averaging._averaged_here for parameter in added)
    DistributedDataParallel(model)(batch).sum().backward()
    assert not any(parameter in averaging._averaged_here for parameter in added)


@pytest.mark.usefixtures("alone")
def test_late_adapters_need_a_group() -> None:
    model, masks, batch = model_and_masks()
    masks.embed()
    wrapped = DistributedDataParallel(model)
    with pytest.raises(EmbedError, match="give its process_group"):
        sylva_compile.add_low_rank(wrapped, 2)
    sylva_compile.add_low_rank(model, 2)
    with pytest.raises(EmbedError, match=r"one\.weight: DistributedDataParallel wrapped"):
        wrapped(batch)


@pytest.mark.usefixtures("alone")
def test_mixed_precision_and_values_that_were_frozen_are_refused() -> None:
    model, masks, batch = model_and_masks()
    masks.embed()
    with pytest.raises(EmbedError, match=r"one\.weight: .*mixed_precision"):
        DistributedDataParallel(model, mixed_precision=_MixedPrecision())
    model.get_parameter("two.weight_values").requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    wrapped(batch).sum().backward()
    model.get_parameter("two.weight_values").requires_grad_(True)
    with pytest.raises(EmbedError, match=r"two\.weight: its values did not require grad"):
        wrapped(batch)
    DistributedDataParallel(model)(batch).sum().backward()


@pytest.mark.usefixtures("alone")
def test_late_adapters_are_averaged_after_a_pass_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks, batch = model_and_masks()
    masks.embed()
    sylva_compile.add_low_rank(model, 2, process_group=dist.group.WORLD)
    sent, send = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **options: (sent.append(tensor), send(tensor, **options)))

    def out_of_memory(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    messages = []
    for fails in (False, True, False, False):
        x = batch.clone().requires_grad_()
        if fails:
            x.register_hook(out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
            model(x).sum().backward()
        messages.append(len(sent))
        sent.clear()
    assert messages == [5, 0, 5, 5]
