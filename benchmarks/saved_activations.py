"""Compare the bytes that a step saves for its backward: frozen model, sylva_compile, PEFT LoRA, full fine-tuning.

    python -m benchmarks.saved_activations                 prints the table and writes benchmarks/results/*.json

Every variant is compiled, in one process, on the same small Llama and the same batch. Bytes are counted by
`torch.autograd.graph.saved_tensors_hooks`: each storage once, without parameters and buffers. Saved input embeddings
count.
"""

from typing import Any

import torch

from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.variants import assert_losses_agree, available, llama, saved_bytes, variants


def measure(hidden: int, layers: int, tokens: int, block_size: int, inner: str) -> dict[str, dict[str, Any]]:
    """Return saved bytes, trainable parameters and loss of each variant."""
    torch.manual_seed(0)
    base = llama(hidden, hidden * 11 // 4, layers)
    ids = torch.randint(0, base.config.vocab_size, (tokens // 256, 256))
    results: dict[str, dict[str, Any]] = {}
    names = available(("frozen", "sylva", "lora", "full"))
    for variant in variants(base, ids, block_size=block_size, sparsity=0.98, inner=inner, names=names):
        saved, loss = saved_bytes(variant)
        trainable = sum(parameter.numel() for parameter in variant.trained)
        results[variant.name] = {"saved_bytes": saved, "trainable": trainable, "loss": loss}
    assert_losses_agree([row["loss"] for row in results.values()])
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=512, help="%(default)s")
    parser.add_argument("--layers", type=int, default=4, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="in sequences of 256 (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
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
