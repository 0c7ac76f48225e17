"""Bytes that a training step saves for its backward: frozen model, ours, PEFT LoRA, full fine-tuning, side by side.

    python benchmarks/saved_activations.py                 prints the table and writes benchmarks/results/*.json

Every variant is compiled, in one process, on the same small Llama and the same batch. Bytes are counted by
`torch.autograd.graph.saved_tensors_hooks`: each storage once, parameters, buffers and the batch itself left out. LoRA
has as many trainable parameters as ours, up to one rank. The frozen model is the floor: all weights frozen, gradients
flow down to the embeddings' output, as they must for any method that trains the lowest layer.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from report import print_table, write_results
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sylva_compile


def small_llama(hidden: int, layers: int) -> LlamaForCausalLM:
    """A randomly initialised Llama, MLP 2.75 x hidden."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def saved_bytes(model: nn.Module, step: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that `step` (forward, returns the loss) saves for the backward."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step()
    total = sum(storage.nbytes() for storage in storages.values())
    loss.backward()
    return total


def measure(hidden: int, layers: int, tokens: int, block_size: int, inner: str) -> dict[str, dict[str, Any]]:
    """Saved bytes, trainable parameters and loss of each variant."""
    torch.manual_seed(0)
    base = small_llama(hidden, layers)
    ids = torch.randint(0, base.config.vocab_size, (tokens // 256, 256))
    embeddings = base.get_input_embeddings()(ids).detach()
    known_backend: Any = "inductor" if inner == "inductor" else "aot_eager"
    results: dict[str, dict[str, Any]] = {}

    def run(name: str, model: nn.Module, backend: Any, *, floor: bool = False) -> None:
        inputs = embeddings.clone().requires_grad_(floor)
        compiled = torch.compile(model, backend=backend)

        def step() -> Tensor:
            loss: Tensor = compiled(inputs_embeds=inputs, labels=ids).loss
            return loss

        saved = saved_bytes(model, step)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = [inputs.grad] if floor else [p.grad for p in trained]
        assert all(g is not None for g in gradients), f"{name}: a gradient is missing"
        assert any(bool(g.abs().max() > 0) for g in gradients if g is not None), f"{name}: every gradient is zero"
        with torch.no_grad():
            loss = float(step())
        results[name] = {"saved_bytes": saved, "trainable": sum(p.numel() for p in trained), "loss": loss}

    frozen = copy.deepcopy(base).requires_grad_(False)
    run("frozen", frozen, known_backend, floor=True)

    ours = copy.deepcopy(base).requires_grad_(False)
    masks = sylva_compile.trace_and_mask(ours, method="random", sparsity=0.98, block_size=block_size)
    backend = sylva_compile.backend(masks, inner=inner, on_miss="error")  # type: ignore[arg-type]
    run("sylva", ours, backend)
    assert backend.report().rewritten == len(masks)

    budget = results["sylva"]["trainable"]
    per_rank = sum(sum(m.weight.shape) for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    config = peft.LoraConfig(r=max(1, round(budget / per_rank)), target_modules="all-linear", lora_dropout=0.0)
    run("lora", peft.get_peft_model(copy.deepcopy(base), config), known_backend)

    full = copy.deepcopy(base).requires_grad_(False)
    for name in masks:
        full.get_parameter(name).requires_grad_(True)
    run("full", full, known_backend)

    losses = [row["loss"] for row in results.values()]
    assert max(losses) - min(losses) < 1e-3 * abs(losses[0]), f"losses differ: {losses}"
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table, write the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    results = measure(**settings)
    floor = results["frozen"]["saved_bytes"]
    rows = [
        [name, f"{row['trainable']:,}", f"{row['saved_bytes'] / 2**20:.1f}", f"{row['saved_bytes'] / floor:.3f}"]
        for name, row in results.items()
    ]
    print_table("Saved for the backward", ["variant", "trainable", "MiB", "of the frozen floor"], rows)
    if not options.no_write:
        print(f"written to {write_results('saved_activations', settings, results)}")
    return results


if __name__ == "__main__":
    main()
