"""One small Llama, trained in each of the ways that the benchmarks compare."""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sylva_compile
from sylva_compile.blocks.quantised_base import quantised_base

VARIANTS = ("frozen", "sylva", "lora", "lora eager", "full")
FLOORS = ("frozen", "sylva")
"""The two variants whose ratio is the main figure."""


def available(names: tuple[str, ...] = VARIANTS) -> tuple[str, ...]:
    """Return `names`; where PEFT is not installed, drop the LoRA variants and print a line."""
    if importlib.util.find_spec("peft") is not None:
        return names
    print("PEFT is not installed: no LoRA variants. Install peft to compare with it.")
    return tuple(name for name in names if "lora" not in name)


@dataclass
class Variant:
    """A model that is ready for training steps.

    Attributes:
        name: one of VARIANTS.
        model: the module that holds the parameters.
        loss: runs the forward pass and returns the loss.
        trained: the parameters that require grad; none for the frozen floor.
        inputs: embeddings `[B, S, hidden]`; in the frozen floor they require grad, so that its backward pass goes down
            through the lowest layer, as it must for any method that trains that layer.
    """

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    trained: list[nn.Parameter]
    inputs: Tensor

    def gradients(self) -> list[Tensor]:
        """Return the gradients after a backward pass. Raises AssertionError where one is missing or all are zero."""
        found = [t.grad for t in (self.trained or [self.inputs]) if t.grad is not None]
        assert len(found) == len(self.trained or [self.inputs]), f"{self.name}: a gradient is missing"
        assert any(bool(gradient.abs().max() > 0) for gradient in found), f"{self.name}: every gradient is zero"
        return found


def llama(hidden: int, mlp: int, layers: int) -> LlamaForCausalLM:
    """Make a randomly initialised Llama with heads of size 64."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def variants(
    base: LlamaForCausalLM,
    ids: Tensor,
    *,
    block_size: int,
    sparsity: float,
    inner: str,
    names: tuple[str, ...] = VARIANTS,
) -> Iterator[Variant]:
    """Yield each variant of `base`, compiled, on the batch `ids [B, S]`.

    LoRA gets as many trainable parameters as "sylva", up to one rank. "sylva" must sample every weight gradient:
    `on_miss="error"` raises where one stays dense.
    """
    embeddings = base.get_input_embeddings()(ids).detach()
    plain: Any = "inductor" if inner == "inductor" else "aot_eager"
    budget = 0

    def ready(name: str, model: nn.Module, backend: Any) -> Variant:
        inputs = embeddings.clone().requires_grad_(name == "frozen")
        run: Any = model if backend is None else torch.compile(model, backend=backend)

        def loss() -> Tensor:
            value: Tensor = run(inputs_embeds=inputs, labels=ids).loss
            return value

        return Variant(name, model, loss, [p for p in model.parameters() if p.requires_grad], inputs)

    ours = copy.deepcopy(base).requires_grad_(False)
    masks = sylva_compile.trace_and_mask(ours, method="random", sparsity=sparsity, block_size=block_size)
    budget = sum(mask.trainable for mask in masks.values())
    per_rank = sum(sum(module.weight.shape) for n, module in base.named_modules() if f"{n}.weight" in masks)
    for name in names:
        if name == "frozen":
            yield ready(name, copy.deepcopy(base).requires_grad_(False), plain)
        elif name == "sylva":
            yield ready(name, ours, sylva_compile.backend(masks, inner=inner, on_miss="error"))  # type: ignore[arg-type]
        elif name in ("lora", "lora eager"):
            import peft  # not on every machine with a GPU

            config = peft.LoraConfig(r=max(1, round(budget / per_rank)), target_modules="all-linear", lora_dropout=0.0)
            model = peft.get_peft_model(copy.deepcopy(base), config)
            yield ready(name, model, plain if name == "lora" else None)
        elif name == "full":
            full = copy.deepcopy(base).requires_grad_(False)
            for weight in masks:
                full.get_parameter(weight).requires_grad_(True)
            yield ready(name, full, plain)


def assert_losses_agree(losses: list[float], dtype: torch.dtype = torch.float32) -> None:
    """Assert that the first losses are equal up to rounding, since all variants start from the same weights."""
    allowed = max(1e-3, 4 * torch.finfo(dtype).eps) * abs(losses[0])
    assert max(losses) - min(losses) < allowed, f"losses differ: {losses}"


def scales_of(model: nn.Module) -> list[Tensor]:
    """Return what quantised weights hold beside their packed values, in attributes that are no buffers."""
    bases = (quantised_base(model, weight) for weight in model.parameters())
    return [tensor for base in bases if base is not None for tensor in base.tensors().values()]


def plain_tensors(tensor: Any) -> list[Tensor]:
    """Return `tensor`, or the tensors that it wraps: some quantised weights consist of several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]


def saved_bytes(variant: Variant) -> tuple[int, float]:
    """Return the bytes of distinct storages that the forward pass saves for the backward, and the loss."""
    held = [*variant.model.parameters(), *variant.model.buffers(), *scales_of(variant.model)]
    known = {plain.untyped_storage().data_ptr() for tensor in held for plain in plain_tensors(tensor)}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in (plain.untyped_storage() for plain in plain_tensors(tensor)):
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = variant.loss()
    total = sum(storage.nbytes() for storage in storages.values())
    loss.backward()
    variant.gradients()
    return total, float(loss.detach())
