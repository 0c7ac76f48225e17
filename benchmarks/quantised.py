"""Compare a step in an NF4 base: the frozen quantised model, which is the floor, sylva_compile, and QLoRA (PEFT).

    python -m benchmarks.quantised                         prints the table and writes benchmarks/results/*.json

All variants are compiled and live in one process, on copies of one small Llama whose linear layers bitsandbytes has
quantised, and take turns, step by step; ratios are ratios of medians. Gradients are checked, and losses compared,
before anything is timed. QLoRA has as many trainable parameters as "sylva", up to one rank.
"""

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.step import compare_with_frozen, one_step, take_turns, warm_compiler
from benchmarks.variants import Variant, assert_losses_agree, llama, saved_bytes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quantise(model: nn.Module, dtype: torch.dtype, *, double: bool) -> nn.Module:
    """Make NF4 of every linear layer of `model` but its head, in place; layers compute in `dtype`."""
    library = importlib.import_module("bitsandbytes").nn
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                layer = library.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    compute_dtype=dtype,
                    compress_statistics=double,
                    quant_type="nf4",
                )
                layer.weight.data = child.weight.data.clone()
                setattr(parent, name, layer.to(child.weight.device))
    # PEFT and transformers ask for it.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model.requires_grad_(False)


def quantised_variants(
    base: Any, ids: Tensor, *, block_size: int, sparsity: float, inner: str, lora: bool
) -> Iterator[Variant]:
    """Yield the variants of the quantised Llama `base`, compiled, on the batch `ids [B, S]`."""
    embeddings = base.get_input_embeddings()(ids).detach()

    def ready(name: str, model: Any, backend: Any) -> Variant:
        inputs = embeddings.clone().requires_grad_(name == "frozen")
        run: Any = torch.compile(model, backend=backend)

        def loss() -> Tensor:
            value: Tensor = run(inputs_embeds=inputs, labels=ids).loss
            return value

        return Variant(name, model, loss, [p for p in model.parameters() if p.requires_grad], inputs)

    ours = copy.deepcopy(base)
    masks = sylva_compile.trace_and_mask(ours, method="random", sparsity=sparsity, block_size=block_size)
    yield ready("frozen", copy.deepcopy(base), inner)
    yield ready("sylva", ours, sylva_compile.backend(masks, inner=inner, on_miss="error"))  # type: ignore[arg-type]
    if lora:
        import peft  # not on every machine

        budget = sum(mask.trainable for mask in masks.values())
        per_rank = sum(sum(mask.shape) for mask in masks.values())
        rank = max(1, round(budget / per_rank))
        names = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in masks})
        config = peft.LoraConfig(r=rank, target_modules=names, lora_dropout=0.0)
        yield ready("qlora", peft.get_peft_model(copy.deepcopy(base), config), inner)


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters but trainable ones: those that the frozen model holds, without scales."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def measure(
    hidden: int,
    mlp: int,
    layers: int,
    tokens: int,
    length: int,
    block_size: int,
    sparsity: float,
    dtype: str,
    double: bool,
    repeats: int,
    inner: str,
) -> dict[str, dict[str, Any]]:
    """Return, by variant: bytes saved for the backward, quantiles of the step's time, and its ratio to the floor."""
    warm_compiler("cpu", inner)
    torch.manual_seed(0)
    kind = _DTYPES[dtype]
    base = quantise(llama(hidden, mlp, layers).to(kind), kind, double=double)
    ids = torch.randint(0, 1024, (max(1, tokens // length), length))
    lora = importlib.util.find_spec("peft") is not None
    ready: list[Variant] = []
    results: dict[str, dict[str, Any]] = {}
    for variant in quantised_variants(base, ids, block_size=block_size, sparsity=sparsity, inner=inner, lora=lora):
        first = one_step(variant)
        variant.gradients()
        saved, loss = saved_bytes(variant)
        trainable = sum(parameter.numel() for parameter in variant.trained)
        results[variant.name] = {
            "trainable": trainable,
            "loss": loss,
            "saved_bytes": saved,
            "packed_bytes": packed_bytes(variant.model),
            "first_step_s": first / 1e3,
        }
        ready.append(variant)
    assert_losses_agree([row["loss"] for row in results.values()], kind)
    compare_with_frozen(results, take_turns(ready, repeats))
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=2752, help="%(default)s")
    parser.add_argument("--layers", type=int, default=2, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="%(default)s")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--sparsity", type=float, default=0.98, help="%(default)s")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="of the computation (%(default)s)")
    parser.add_argument("--double", action="store_true", help="quantise the scales too")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    results = measure(**settings)
    rows = [
        [
            name,
            f"{row['trainable']:,}",
            f"{row['saved_bytes'] / 2**20:.2f}",
            f"{row['saved_of_floor']:.3f}",
            f"{row['step_ms']['median']:.1f}",
            f"{row['of_floor']:.3f}",
            f"{row['first_step_s']:.1f}",
        ]
        for name, row in results.items()
    ]
    columns = ["variant", "trainable", "saved, MiB", "of the floor", "ms", "of the floor", "first step, s"]
    print_table("A step in an NF4 base", columns, rows)
    if not options.no_write:
        print(f"written to {write_results('quantised', settings, results)}")
    return results


if __name__ == "__main__":
    main()
