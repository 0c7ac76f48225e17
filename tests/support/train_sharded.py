"""One of several processes that train tiny Llamas under `fully_shard`: `python train_sharded.py RANK RANKS DIRECTORY`.

Every process also trains a twin alone, on the joint batch, and compares.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.shards import whole
from sylva_compile.errors import EmbedError, GradientError
from sylva_compile.optim import AdamW, Muon
from sylva_compile.schedules import MovingBlocks

MESH = ("copies", "shards")
STEPS = 3

Optimizer = Callable[[Masks], torch.optim.Optimizer]


def sgd(masks: Masks) -> torch.optim.Optimizer:
    return torch.optim.SGD(masks.parameters(), lr=0.5)


def torch_adamw(masks: Masks) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masks.parameters(), lr=1e-2)


def adamw(masks: Masks) -> torch.optim.Optimizer:
    return AdamW(masks.parameters(), lr=1e-2, eps=1e-6, max_grad_norm=1e-3)


def muon(masks: Masks) -> torch.optim.Optimizer:
    return Muon(masks.parameters(), lr=1e-2)


class Training:
    """A tiny Llama with blocks.

    `how` says when they were embedded: "before" the model was sharded over all processes, "after" that, or "alone",
    without that.
    """

    def __init__(self, how: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 64}
        self.model = LlamaForCausalLM(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False, attention_dropout=0.0)
        ).to(dtype)
        self.model.requires_grad_(False)
        # Blocks of 16 cross the borders of shards and the edges of weights.
        torch.manual_seed(seed)
        self.masks = sylva_compile.trace_and_mask(self.model, method="random", sparsity=0.6, block_size=16)
        torch.manual_seed(1)
        self.ids = torch.randint(3, 64, (8 if dist.get_world_size() == 4 else 6, 10))
        self.how = how
        if how == "alone":
            self.masks.embed()
            return
        rank, ranks = dist.get_rank(), dist.get_world_size()
        self.ids = self.ids.chunk(ranks)[rank]
        if how == "before":
            self.masks.embed()
        # Four processes are two copies of a model that two processes share.
        mesh = init_device_mesh("cpu", (ranks,) if ranks < 4 else (2, 2), mesh_dim_names=MESH[: 1 + ranks // 4])
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(self.model, mesh=mesh, **options)
        self.masks.embed()

    def loss(self, ids: Tensor | None = None) -> Tensor:
        ids = self.ids if ids is None else ids
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def train(self, optimizer: torch.optim.Optimizer, steps: int = STEPS, after: Callable[[], Any] = int) -> None:
        for _ in range(steps):
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            after()

    def weights(self) -> dict[str, Tensor]:
        """Return all values of the model, on every process."""
        for state in block_states(self.model).values():
            assert state.is_synced(), state.name
        found = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        every = [found]
        if dist.get_world_size() > 1 and self.how != "alone":
            # Only the first process gets the full state dict.
            every = [found if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(every)
        return {name: value.clone() for name, value in every[0].items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def compare(case: str, alone: Training, sharded: Training, most: float) -> None:
    base = Training("alone", next(alone.model.parameters()).dtype).weights()
    found, wanted = sharded.weights(), alone.weights()
    apart, moved = difference(found, wanted), difference(base, wanted)
    print(f"{case}: {apart:.1e} apart, {moved:.1e} moved", flush=True)
    assert moved > 1e-3 and apart <= most, case


def like_one_process(how: str, make: Optimizer, most: float, inner: Any = None, **options: Any) -> None:
    alone, sharded = Training("alone"), Training(how, **options)
    alone.train(make(alone.masks))
    if inner is not None:
        torch._dynamo.reset()
        backend = sylva_compile.backend(sharded.masks, inner=inner, on_miss="error")
        sylva_compile.compile_layers(sharded.model, backend)
    sharded.train(make(sharded.masks))
    if inner is not None:
        assert backend.report().rewritten == len(sharded.masks), str(backend.report())
    compare(f"{how}, {make.__name__}, {inner}, {options}", alone, sharded, most)


def in_bfloat16(how: str) -> None:
    alone, sharded = (Training(each, torch.bfloat16) for each in ("alone", how))
    for each in (alone, sharded):
        each.train(torch.optim.SGD(each.masks.parameters(), lr=0.1), steps=1)
    found, wanted = sharded.weights(), alone.weights()
    for name in found:
        ulps = (found[name].view(torch.int16).int() - wanted[name].view(torch.int16).int()).abs()
        # A product in bfloat16 over half of the batch is rounded by itself.
        near_zero = wanted[name].abs() < 1e-2
        assert int(ulps[~near_zero].max()) <= 1, name
    assert difference(found, Training("alone", torch.bfloat16).weights()) > 1e-3


def accumulated(how: str) -> None:
    alone, sharded = Training("alone"), Training(how)
    alone.train(adamw(alone.masks))
    optimizer = adamw(sharded.masks)
    first, rest = sharded.ids[:1], sharded.ids[1:]
    for _ in range(STEPS):
        sharded.model.set_requires_gradient_sync(False)
        (sharded.loss(first) * len(first) / len(sharded.ids)).backward()
        sharded.model.set_requires_gradient_sync(True)
        (sharded.loss(rest) * len(rest) / len(sharded.ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
    compare(f"{how}, accumulated", alone, sharded, 2e-5)


def checkpointed(how: str) -> None:
    alone, sharded = Training("alone"), Training("alone")
    alone.train(sgd(alone.masks))
    sharded = Training.__new__(Training)
    plain = Training("alone")
    sharded.how, sharded.model, sharded.masks = how, plain.model, plain.masks
    sharded.ids = plain.ids.chunk(dist.get_world_size())[dist.get_rank()]
    apply_activation_checkpointing(sharded.model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    for layer in sharded.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded.model)
    sharded.train(sgd(sharded.masks))
    names = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in sharded.weights().items()}
    assert difference(names, alone.weights()) <= 2e-8
    assert set(block_states(sharded.model)) == set(sharded.masks)


def moving(how: str, make: Optimizer) -> None:
    alone, sharded = Training("alone"), Training(how)
    for each in (alone, sharded):
        optimizer = make(each.masks)
        schedule = MovingBlocks(each.masks, every=1, seed=3, optimizer=optimizer, carry="intersection")
        each.train(optimizer, after=schedule.step)
    assert dict(alone.masks) == dict(sharded.masks)
    compare(f"{how}, moving, {make.__name__}", alone, sharded, 2e-5)
    sylva_compile.unload_adapter(sharded.model)
    base = Training("alone")
    sylva_compile.unload_adapter(base.model)
    assert difference(sharded.weights(), base.weights()) == 0
    with torch.no_grad():
        mine, joint = sharded.loss(), base.loss(sharded.ids)
    torch.testing.assert_close(mine, joint)
    # FSDP would have put blocks that it still knows into the module again.
    assert not any("_blocks" in name for name, _ in sharded.model.named_parameters())


def other_moves_in_other_copies(how: str) -> None:
    sharded = Training(how)
    schedule = MovingBlocks(sharded.masks, every=1, seed=dist.get_rank() // 2)
    with pytest.raises(EmbedError, match="different places"):
        schedule.step()


def edited_by_hand(how: str) -> None:
    """An edit of blocks or of a weight reaches the gathered weight of the next pass, and the shards."""
    sharded, alone = Training(how), Training("alone")
    for each in (sharded, alone):
        with torch.no_grad():
            each.loss()
            each.masks.parameters()[0].mul_(3.0)
            list(block_states(each.model).values())[1].weight.mul_(0.5)
    with torch.no_grad():
        torch.testing.assert_close(sharded.loss(), alone.loss(sharded.ids))
    assert difference(sharded.weights(), alone.weights()) == 0
    assert not list(block_states(sharded.model).values())[1].base_known


def adapters(how: str, directory: Path) -> None:
    alone, sharded = Training("alone"), Training(how)
    base = Training("alone").weights()
    sharded.train(muon(sharded.masks))
    trained = sharded.weights()
    sylva_compile.save_adapter(sharded.model, directory / f"{how}")
    with torch.no_grad(), sylva_compile.disable_adapter(sharded.model):
        torch.testing.assert_close(sharded.loss(), alone.loss(sharded.ids))
    assert difference(sharded.weights(), trained) == 0
    # One process loads what several have saved, and saves the same file.
    sylva_compile.unload_adapter(alone.model)
    sylva_compile.load_adapter(alone.model, directory / f"{how}")
    assert difference(alone.weights(), trained) == 0
    if dist.get_rank() == 0:
        sylva_compile.save_adapter(alone.model, directory / f"{how} again")
        names = [{file.name for file in (directory / each).glob("*.safetensors")} for each in (how, f"{how} again")]
        assert names[0] == names[1], names
    # Several load it onto a base that is sharded already.
    other = Training("after")
    sylva_compile.unload_adapter(other.model)
    assert difference(other.weights(), base) == 0
    sylva_compile.load_adapter(other.model, directory / f"{how}")
    assert difference(other.weights(), trained) == 0
    sharded.masks.write_through()
    sylva_compile.unload_adapter(sharded.model)
    assert difference(sharded.weights(), base) == 0
    with torch.no_grad():
        sylva_compile.unload_adapter(alone.model)
        torch.testing.assert_close(sharded.loss(), alone.loss(sharded.ids))


def state_dicts(how: str) -> None:
    """The state dict of all values goes into another sharded model, and its blocks follow."""
    first, other = Training(how), Training(how)
    first.train(sgd(first.masks))
    wanted = first.weights()
    given = dict(wanted) if dist.get_rank() == 0 else {}
    set_model_state_dict(other.model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert difference(other.weights(), wanted) == 0
    for one, two in zip(first.masks.parameters(), other.masks.parameters(), strict=True):
        assert torch.equal(whole(one), whole(two))


def refusals(how: str) -> None:
    with pytest.raises(EmbedError, match="in different places"):
        Training(how, seed=dist.get_rank())
    sharded = Training(how)
    optimizer = AdamW(sharded.masks.parameters(), lr=1e-2, nonfinite="raise")
    before = sharded.weights()
    sharded.loss().backward()
    if dist.get_rank() == 0:
        gradient = sharded.masks.parameters()[0].grad
        gradient = getattr(gradient, "_local_tensor", gradient)
        gradient.view(-1)[:1] = float("nan")
    # Plain blocks have one gradient for all processes, and a NaN in one of them is none of the library's doing.
    if how == "before":
        with pytest.raises(GradientError):
            optimizer.step()
        assert difference(sharded.weights(), before) == 0
    with pytest.raises(EmbedError, match="disable_adapter"):
        sylva_compile.reference_model(sharded.model)


def optimizer_from_before() -> None:
    plain = Training("alone")
    optimizer = sgd(plain.masks)
    model: nn.Module = plain.model
    fully_shard(model)
    plain.ids = plain.ids.chunk(dist.get_world_size())[dist.get_rank()]
    plain.loss().backward()
    with pytest.raises(EmbedError, match="after fully_shard"):
        optimizer.step()


def main(directory: Path) -> None:
    ranks = dist.get_world_size()
    for how in ("before", "after"):
        # Division by three is not exact.
        like_one_process(how, sgd, 1e-8 if ranks == 2 else 2e-8)
        moving(how, adamw)
        if ranks == 4:
            other_moves_in_other_copies(how)
            continue
        adapters(how, directory)
        if ranks == 3:
            like_one_process(how, muon, 1e-5)
            continue
        like_one_process(how, muon, 1e-5, "aot_eager")
        like_one_process(how, torch_adamw, 1e-5, "aot_eager", reshard_after_forward=False)
        accumulated(how)
        in_bfloat16(how)
        edited_by_hand(how)
        state_dicts(how)
        refusals(how)
    if ranks == 2:
        checkpointed("before")
        optimizer_from_before()
        like_one_process("before", sgd, 1e-8, offload_policy=CPUOffloadPolicy(pin_memory=False))
        like_one_process("before", adamw, 1e-5, "inductor")


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[3]}/store", int(sys.argv[2])):
        main(Path(sys.argv[3]))
