"""One of several processes that trace tiny models under `fully_shard`: `python trace_sharded.py RANK RANKS DIRECTORY`.

The test traces the same models by itself, over the batches of all processes, and compares the files.
"""

import gc
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from two_ranks import process_group

import sylva_compile
from sylva_compile import Masks, SylvaConfig
from sylva_compile._torch import compiled_call
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.blocks.shards import is_sharded, local
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.together import observe_together
from sylva_compile.tracing.trace import weight_specs

OPTIONS: dict[str, Any] = {"block_size": 16, "sparsity": 0.6, "progress": False, "num_samples": 8, "rank": 64}
METHODS = [
    SylvaConfig(**{**OPTIONS, "method": method, "score": score})
    for method, score in (("sylva", "gain"), ("sylva", "paper"), ("kfac", "greedy"), ("fisher", "gain"))
]
Batch = tuple[Tensor, Tensor]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # Weights of 20 to 56 rows: shards are uneven on three processes, and blocks cross their borders.
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (4, 2, 9), generator=generator)
    return [{"input_ids": each, "labels": each} for each in ids]


class Layer(nn.Module):
    """A layer with a Linear, GPT-2's Conv1D, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 56), Conv1D(40, 56)
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).tanh())
        return x + self.second(self.first(x).tanh())


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.expert, self.head = nn.Linear(40, 40), nn.Linear(40, 30)

    def forward(self, x: Tensor) -> Tensor:
        chosen = bool(x[0, 0, 0] > 0)
        for layer in self.layers:
            x = layer(x)
        if chosen:
            x = x + self.expert(x).tanh()
        # FSDP warns of a model that returns a view.
        return self.head(x).clone()


class Called(nn.Module):
    """A model that calls parts of its layers, and not the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.second(layer.first(x + layer.down(layer.up(x)))).tanh()
        return x[..., :30].clone()


def regression(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1].to(batch[0].dtype)).square().mean()


def points() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    found = [(torch.randn(2, 5, 40, generator=generator), torch.randn(2, 5, 30, generator=generator)) for _ in range(4)]
    for number, (inputs, _) in enumerate(found):
        # The first batch alone reaches the expert: one process of several.
        inputs[0, 0, 0] = 1.0 if number == 0 else -1.0
    return found


class Fan:
    """Passes operands to the estimators of several methods, so that one trace is enough for all."""

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup | None = None, methods: list[SylvaConfig] = METHODS
    ) -> None:
        weights = weights_in_scope(model, "all-linear")
        specs = weight_specs(model, weights)
        self.each = {config: Estimators(specs, config, split_over=group) for config in methods}
        data = [(x.to(next(iter(weights.values())).dtype), y) for x, y in points()]
        if group is None:
            observe(model, weights, self, data, num_samples=8, loss_fn=regression)
        else:
            batches = mine(data)
            observe_together(model, weights, self, batches, group, num_samples=2 * len(batches), loss_fn=regression)
            for one in self.each.values():
                one.combine(group)
        self.scores = {
            f"{config.method} {config.score} {name}": one.scores(name)
            for config, one in self.each.items()
            for name in weights
        }

    def update(self, name: str, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None) -> None:
        for one in self.each.values():
            one.update(name, inputs, output_gradients, offsets)

    def end_batch(self) -> None:
        for one in self.each.values():
            one.end_batch()

    def waiting(self) -> list[str]:
        return next(iter(self.each.values())).waiting()

    def settle(self, names: Collection[str]) -> None:
        for one in self.each.values():
            one.settle(names)


def mine(batches: list[Any]) -> list[Any]:
    """Return this process's share: where there are three, the first one has a batch more than the others."""
    return batches[dist.get_rank() :: dist.get_world_size()]


def split(model: nn.Module, layers: Any, **options: Any) -> Any:
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def weight_bytes(shapes: set[torch.Size]) -> int:
    """Return the bytes of all live tensors in the whole shape of a weight: weights, gradients and their sums."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, nn.Parameter) and tensor.shape in shapes
    }
    return sum(found.values())


def llama_like_one_process(directory: Path) -> None:
    """Save the masks of a trace, and check what it holds meanwhile."""
    model = llama()
    shapes = {weight.shape for name, weight in model.named_parameters() if "proj" in name}
    every = sum(weight.nbytes for weight in model.model.layers.parameters())
    split(model, model.model.layers)
    for name, each in sylva_compile.estimate(model, **OPTIONS).weights.items():
        m, n = model.get_parameter(name).shape
        assert each.memory.gradient == 4 * -(-m // dist.get_world_size()) * n
    most, waiting = 0, 0
    update = Estimators.update

    def measured(self: Estimators, *arguments: Any) -> None:
        nonlocal most, waiting
        update(self, *arguments)
        waiting = max(waiting, len(self.waiting()))
        # Looking through all objects takes a while. In this layer's backward pass, the next one is gathered already.
        if "layers.1.self_attn.q_proj" in arguments[0]:
            most = max(most, weight_bytes(shapes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimators, "update", measured)
        masks = sylva_compile.trace_and_mask(model, mine(sentences()), **OPTIONS)
    masks.save(directory / f"llama{dist.get_rank()}")
    # Two of four layers are gathered at a time, and the operands of one layer wait.
    assert 0 < most <= 0.6 * every, (most, every)
    assert waiting == 7


def snapshot(model: nn.Module) -> list[Any]:
    """Return all that a trace must leave as it was."""
    found: list[Any] = [torch.random.get_rng_state().tolist()]
    for name, module in model.named_modules():
        # The first pass gives hooks for state dicts to modules.
        hooks = {kind: len(value) for kind, value in vars(module).items() if "ward_" in kind and "hooks" in kind}
        own = sorted(vars(module).keys() - {"_compiled_call_impl"})
        found.append((name, type(module), module.training, compiled_call(module), own, hooks))
        for attribute, parameter in module._parameters.items():
            assert parameter is None or is_sharded(parameter), attribute
            if parameter is not None:
                gradient = None if parameter.grad is None else local(parameter.grad).tolist()
                found.append((attribute, id(parameter), parameter.requires_grad, local(parameter).tolist(), gradient))
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = [(group._training_state, group._sharded_state) for group in state._fsdp_param_groups]
            found.append((state._training_state, state._state_ctx.iter_forward_root, groups))
    return found


def trace(model: nn.Module, loss_fn: Any = regression, batches: list[Any] | None = None, **options: Any) -> Masks:
    batches = mine(points()) if batches is None else batches
    return sylva_compile.trace_and_mask(model, batches, loss_fn=loss_fn, **{**OPTIONS, **options})


def gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    regression(model, batch).backward()
    found = [local(parameter.grad).clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters())) - 2
    model.zero_grad()
    return found


def left_as_found(again: bool) -> None:
    """A trace is the first pass of the model, or comes after a pass that has left whole weights gathered."""
    # In the first pass FSDP notes the dtype of gradients, for good.
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    if again:
        options = {"reshard_after_forward": False}
    model, twin = Stack(), Stack()
    for each in (model, twin):
        split(each, each.layers, **options)
        each.layers[1].eval()
    # FSDP trains no weight that one process alone uses.
    batch = points()[1 + dist.get_rank()]
    if again:
        gradients(model, batch)
        regression(model, batch).backward()
        with torch.no_grad():
            model(batch[0])
        model.reshard()
        for layer in model.layers:
            layer.reshard()
    before = snapshot(model)
    if again:
        with torch.no_grad():
            model(batch[0])
        assert not is_sharded(model.layers[0].up.weight)
    masks = trace(model)
    assert snapshot(model) == before
    model.zero_grad()
    # Weights that require grad are trained by FSDP as if there had been no trace.
    for one, other in zip(gradients(model, batch), gradients(twin, batch), strict=True):
        torch.testing.assert_close(one, other)
    masks.embed(model)
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = regression(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def errors(directory: Path) -> None:
    """An error in a pass leaves the model as it was, and one of the library on one process reaches all."""
    model, twin = Stack(), Stack()
    for each in (model, twin):
        split(each, each.layers)
    batch = points()[1 + dist.get_rank()]
    gradients(model, batch)
    before = snapshot(model)

    def fail(*arguments: Any) -> None:
        raise ArithmeticError("out of luck")

    def in_backward(model: nn.Module, batch: Batch) -> Tensor:
        handle = model.layers[1].register_forward_hook(lambda *given: given[2].register_hook(fail) and None)
        try:
            return regression(model, batch)
        finally:
            handle.remove()

    def in_forward(model: nn.Module, batch: Batch) -> Tensor:
        handle = model.layers[1].register_forward_pre_hook(fail)
        try:
            return regression(model, batch)
        finally:
            handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        for loss_fn in (in_backward, in_forward):
            with pytest.raises(ArithmeticError, match="out of luck"):
                trace(model, loss_fn)
            assert snapshot(model) == before
            for one, other in zip(gradients(model, batch), gradients(twin, batch), strict=True):
                torch.testing.assert_close(one, other)
            # The second time as in versions of torch without this method.
            patch.delattr(FSDPModule, "reset_iter_state", raising=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def broken(number: int) -> Any:
        yield batch
        if number == rank:
            fail()
        yield batch

    last = rank == ranks - 1
    not_finite = [(batch[0], batch[1] * torch.inf if last else batch[1])]
    for batches, theirs, own in (
        ([] if last else [batch], f"Process {ranks - 1}.*gave no batches", "gave no batches"),
        (not_finite, f"Process {ranks - 1}.*loss is inf", "loss is inf"),
        (broken(ranks - 1), f"Process {ranks - 1}.*out of luck", "out of luck"),
    ):
        with pytest.raises((TraceError, ArithmeticError), match=own if last else theirs):
            trace(model, batches=batches)
        assert snapshot(model) == before
    with pytest.raises(ArgumentError, match="checkpoint"):
        trace(model, checkpoint=str(directory / "trace"))
    with pytest.raises(ArgumentError, match="other processes"):
        trace(model, process_group=dist.new_group([rank], use_local_synchronization=True))
    assert dict(trace(model, method="magnitude")) == dict(trace(Stack(), method="magnitude"))


def main(directory: Path) -> None:
    ranks = dist.get_world_size()
    llama_like_one_process(directory)
    stacks: dict[str, nn.Module] = {"float32": Stack()}
    if ranks == 2:
        stacks |= {"bfloat16": Stack().bfloat16(), "checkpointed": Stack(), "called": Called()}
        apply_activation_checkpointing(stacks["checkpointed"], check_fn=lambda module: isinstance(module, Layer))
    for name, model in stacks.items():
        split(model, [] if name == "called" else model.layers)
        found = Fan(model, dist.group.WORLD, METHODS if name == "float32" else METHODS[:1])
        torch.save(found.scores, directory / f"{name}{dist.get_rank()}")
    if ranks == 2:
        left_as_found(False)
        left_as_found(True)
        errors(directory)


if __name__ == "__main__":
    with process_group(int(sys.argv[1]), f"{sys.argv[3]}/store", int(sys.argv[2])):
        main(Path(sys.argv[3]))
