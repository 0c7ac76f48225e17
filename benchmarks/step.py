"""Time of a training step's forward and backward pass against the frozen floor, side by side.

    python benchmarks/step.py                              prints the table and writes benchmarks/results/*.json

All variants live in one process and take turns, step by step, so that whatever else the machine does hits all of them
alike; the ratios are of medians. Gradients are checked and losses compared before anything is timed. The optimizer's
step is not part of the figure.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from report import print_table, write_results
from variants import VARIANTS, Variant, assert_losses_agree, llama, variants


def one_step(variant: Variant) -> float:
    """Milliseconds of a forward and a backward pass."""
    variant.model.zero_grad()
    variant.inputs.grad = None
    _wait()
    started = time.perf_counter()
    variant.loss().backward()
    _wait()
    return (time.perf_counter() - started) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    hidden: int,
    mlp: int,
    layers: int,
    tokens: int,
    length: int,
    block_size: int,
    sparsity: float,
    device: str,
    dtype: str,
    repeats: int,
    inner: str,
) -> dict[str, dict[str, Any]]:
    """Quantiles of the step time of each variant, its ratio to the floor, and the seconds of its first step."""
    torch.manual_seed(0)
    base = llama(hidden, mlp, layers).to(device=device, dtype=getattr(torch, dtype))
    ids = torch.randint(0, base.config.vocab_size, (max(1, tokens // length), length), device=device)
    ready: list[Variant] = []
    results: dict[str, dict[str, Any]] = {}
    for variant in variants(base, ids, block_size=block_size, sparsity=sparsity, inner=inner):
        first = one_step(variant)
        variant.gradients()
        with torch.no_grad():
            loss = float(variant.loss())
        trainable = sum(parameter.numel() for parameter in variant.trained)
        results[variant.name] = {"trainable": trainable, "loss": loss, "first_step_s": first / 1e3}
        ready.append(variant)
    assert_losses_agree([row["loss"] for row in results.values()])
    times: dict[str, list[float]] = {variant.name: [] for variant in ready}
    gc.disable()
    try:
        for turn in range(repeats + 2):
            # Each turn begins with another variant: nobody always follows the same neighbour.
            for variant in ready[turn % len(ready) :] + ready[: turn % len(ready)]:
                elapsed = one_step(variant)
                if turn >= 2:
                    times[variant.name].append(elapsed)
    finally:
        gc.enable()
    floor = statistics.median(times["frozen"])
    for name, row in results.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        row.update(step_ms={"q25": low, "median": middle, "q75": high}, of_floor=middle / floor)
    return results


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table, write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=2752, help="%(default)s")
    parser.add_argument("--layers", type=int, default=2, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="%(default)s")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--sparsity", type=float, default=0.98, help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    results = measure(**settings)
    rows = [
        [
            name,
            f"{results[name]['trainable']:,}",
            f"{results[name]['step_ms']['median']:.1f}",
            f"{results[name]['of_floor']:.3f}",
            f"{results[name]['first_step_s']:.1f}",
        ]
        for name in VARIANTS
    ]
    print_table("Forward and backward", ["variant", "trainable", "ms", "of the frozen floor", "first step, s"], rows)
    if not options.no_write:
        print(f"written to {write_results('step', settings, results)}")
    return results


if __name__ == "__main__":
    main()
