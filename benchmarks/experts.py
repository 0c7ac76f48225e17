"""Compare blocks in experts with the frozen model and with PEFT's `target_parameters`: bytes saved, and time.

    python -m benchmarks.experts                           prints the tables and writes benchmarks/results/*.json

Small mixtures of experts in the layouts of Qwen3-MoE and Mixtral, on the CPU. All variants of a model live in one
process and take turns, step by step. Ours trains blocks of every stacked weight; PEFT's LoRA trains low-rank changes of
the same weights, with as many parameters up to one rank. PEFT's changes break the graph, so that its model runs
uncompiled; beside it stands the frozen model uncompiled.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.step import compare_with_frozen, one_step, take_turns
from benchmarks.variants import Variant, assert_losses_agree, available, saved_bytes

MODELS = ("qwen3-moe", "mixtral")


def mixture(name: str, hidden: int, mlp: int, layers: int, experts: int, chosen: int) -> PreTrainedModel:
    """Make a randomly initialised mixture of experts with heads of size 64."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "vocab_size": 1024,
        "num_experts_per_tok": chosen,
        "use_cache": False,
    }
    if name == "mixtral":
        model: PreTrainedModel = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=experts))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=mlp, num_experts=experts))
    for parameter in model.parameters():
        if parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.02)
    model.set_experts_implementation("grouped_mm")
    return model


def _variants(
    base: PreTrainedModel, ids: torch.Tensor, block_size: int, sparsity: float, inner: Any
) -> Iterator[Variant]:
    embeddings = base.get_input_embeddings()(ids).detach()

    def ready(name: str, model: nn.Module, backend: Any) -> Variant:
        # Of all variants: experts need no backward pass through the lowest attention, which the frozen model has.
        inputs = embeddings.clone().requires_grad_(True)
        run: Any = model if backend is None else torch.compile(model, backend=backend)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Variant(name, model, lambda: run(inputs_embeds=inputs, labels=ids).loss, trained, inputs)

    ours = copy.deepcopy(base).requires_grad_(False)
    settings = {"sparsity": sparsity, "block_size": block_size, "scope": ["experts"]}
    masks = sylva_compile.trace_and_mask(ours, method="random", **settings)
    yield ready("frozen", copy.deepcopy(base).requires_grad_(False), inner)
    yield ready("sylva", ours, sylva_compile.backend(masks, inner=inner, on_miss="error"))
    yield ready("frozen eager", copy.deepcopy(base).requires_grad_(False), None)
    if "lora eager" in available(("lora eager",)):
        import peft

        stacked = {name: base.get_parameter(name) for name in masks}
        per_rank = sum(weight.shape[0] * sum(weight.shape[1:]) for weight in stacked.values())
        budget = sum(mask.trainable for mask in masks.values())
        names = sorted({name.split("mlp.")[-1] for name in stacked})
        config = peft.LoraConfig(
            r=max(1, round(budget / per_rank)), target_modules=[], target_parameters=names, lora_dropout=0.0
        )
        yield ready("lora eager", peft.get_peft_model(copy.deepcopy(base), config), None)


def measure(
    model: str,
    hidden: int,
    mlp: int,
    layers: int,
    experts: int,
    chosen: int,
    tokens: int,
    length: int,
    block_size: int,
    sparsity: float,
    dtype: str,
    repeats: int,
    inner: str,
) -> dict[str, dict[str, Any]]:
    """Return saved bytes, step times and their ratios to the compiled frozen model's, by variant."""
    torch.manual_seed(0)
    base = mixture(model, hidden, mlp, layers, experts, chosen).to(getattr(torch, dtype))
    ids = torch.randint(0, base.config.vocab_size, (max(1, tokens // length), length))
    ready: list[Variant] = []
    results: dict[str, dict[str, Any]] = {}
    for variant in _variants(base, ids, block_size, sparsity, inner):
        one_step(variant)
        variant.gradients()
        saved, loss = saved_bytes(variant)
        results[variant.name] = {
            "trainable": sum(parameter.numel() for parameter in variant.trained),
            "loss": loss,
            "saved_bytes": saved,
        }
        ready.append(variant)
    assert_losses_agree([row["loss"] for row in results.values()], getattr(torch, dtype))
    compare_with_frozen(results, take_turns(ready, repeats))
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure, print the tables and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models (all)")
    parser.add_argument("--hidden", type=int, default=512, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=768, help="of an expert (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="%(default)s")
    parser.add_argument("--experts", type=int, default=8, help="%(default)s")
    parser.add_argument("--chosen", type=int, default=2, help="experts of a token (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="%(default)s")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--sparsity", type=float, default=0.98, help="%(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="%(default)s")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key not in ("no_write", "models")}
    results = {}
    for name in options.models:
        torch._dynamo.reset()
        results[name] = measure(name, **settings)
        rows = [
            [
                variant,
                f"{row['trainable']:,}",
                f"{row['step_ms']['median']:.1f}",
                f"{row['of_floor']:.3f}",
                f"{row['saved_bytes'] / 2**20:.2f}",
                f"{row['saved_of_floor']:.3f}",
            ]
            for variant, row in results[name].items()
        ]
        print_table(name, ["variant", "trainable", "ms", "of the floor", "saved, MiB", "of the floor"], rows)
    if not options.no_write:
        print(f"written to {write_results('experts', {**settings, 'models': options.models}, results)}")
    return results


if __name__ == "__main__":
    main()
