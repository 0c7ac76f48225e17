"""Compare the forward and backward pass of each way to train with those of the frozen model, the floor.

    python -m benchmarks.step                              prints the table and writes benchmarks/results/*.json

All variants live in one process and take turns, step by step, so that other load on the machine slows all of them
alike; the ratios are ratios of medians. Gradients are checked and losses compared before anything is timed. The
optimizer's step is not measured.

Measured beside the time: the bytes saved for the backward, the peak of memory above that between steps, the time of the
first step above a usual one (compilation), the number of steps that win this time back against eager LoRA, and the time
in SDDMM as a share of the floor, from torch's profiler.
"""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

from benchmarks.command import parser_of
from benchmarks.peak import peak_above
from benchmarks.report import print_table, write_results
from benchmarks.variants import VARIANTS, Variant, assert_losses_agree, available, llama, saved_bytes, variants


def one_step(variant: Variant) -> float:
    """Run a forward and a backward pass and return the milliseconds that they take."""
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


def warm_compiler(device: str, inner: str) -> None:
    """Compile a small model, so that the first variant does not pay for loading the compiler."""
    model = torch.nn.Linear(8, 8).to(device)
    torch.compile(model.__call__, backend=inner)(torch.zeros(2, 8, device=device)).sum().backward()


def peak_bytes(variant: Variant) -> int:
    """Return the peak bytes that a step allocates, gradients included."""
    variant.model.zero_grad(set_to_none=True)
    variant.inputs.grad = None
    return peak_above(lambda: one_step(variant), variant.inputs.device)[1]


def sddmm_ms(variant: Variant, steps: int = 5) -> float:
    """Return the milliseconds that a step spends in SDDMM."""
    on_gpu = variant.inputs.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            one_step(variant)
    events = [event for event in profiler.key_averages() if event.key.startswith("sylva::sddmm")]
    total = sum(event.device_time_total if on_gpu else event.cpu_time_total for event in events)
    return float(total) / steps / 1e3


def take_turns(ready: list[Variant], repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of `repeats` steps of each variant, after two warm-up steps."""
    times: dict[str, list[float]] = {variant.name: [] for variant in ready}
    gc.disable()
    try:
        for turn in range(repeats + 2):
            # Each turn begins with another variant, so that no variant is always the first.
            for variant in ready[turn % len(ready) :] + ready[: turn % len(ready)]:
                elapsed = one_step(variant)
                if turn >= 2:
                    times[variant.name].append(elapsed)
    finally:
        gc.enable()
    return times


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
    names: list[str],
) -> dict[str, dict[str, Any]]:
    """Return, by variant: quantiles of the step time, its ratio to the floor, bytes, and the time of compilation."""
    warm_compiler(device, inner)
    torch.manual_seed(0)
    base = llama(hidden, mlp, layers).to(device=device, dtype=getattr(torch, dtype))
    ids = torch.randint(0, base.config.vocab_size, (max(1, tokens // length), length), device=device)
    ready: list[Variant] = []
    results: dict[str, dict[str, Any]] = {}
    chosen = available(tuple(name for name in VARIANTS if name in names))
    for variant in variants(base, ids, block_size=block_size, sparsity=sparsity, inner=inner, names=chosen):
        first = one_step(variant)
        variant.gradients()
        saved, loss = saved_bytes(variant)
        trainable = sum(parameter.numel() for parameter in variant.trained)
        results[variant.name] = {
            "trainable": trainable,
            "loss": loss,
            "first_step_s": first / 1e3,
            "saved_bytes": saved,
        }
        results[variant.name]["peak_bytes"] = peak_bytes(variant)
        ready.append(variant)
    assert_losses_agree([row["loss"] for row in results.values()], base.dtype)
    times = take_turns(ready, repeats)
    floor = statistics.median(times["frozen"])
    for name, row in results.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        row.update(step_ms={"q25": low, "median": middle, "q75": high}, of_floor=middle / floor)
        row["compile_s"] = max(0.0, row["first_step_s"] - middle / 1e3)
    for name, row in results.items():
        row["break_even_steps"] = break_even(row, results.get("lora eager")) if name != "lora eager" else None
    for variant in ready:
        if variant.name == "sylva":
            alone = sddmm_ms(variant)
            results["sylva"].update(sddmm_ms=alone, sddmm_of_floor=alone / floor)
    return results


def break_even(row: dict[str, Any], eager: dict[str, Any] | None) -> int | None:
    """Return the number of steps that win compilation back against eager LoRA; None if none do or LoRA was not run."""
    if eager is None or row["step_ms"]["median"] >= eager["step_ms"]["median"]:
        return None
    won = (eager["step_ms"]["median"] - row["step_ms"]["median"]) / 1e3
    return max(0, round((row["compile_s"] - eager["compile_s"]) / won))


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the printed table."""
    rows = []
    for name, row in results.items():
        steps = row["break_even_steps"]
        rows.append(
            [
                name,
                f"{row['trainable']:,}",
                f"{row['step_ms']['median']:.1f}",
                f"{row['of_floor']:.3f}",
                f"{row['saved_bytes'] / 2**20:.1f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['compile_s']:.1f}",
                "-" if steps is None else str(steps),
            ]
        )
    return rows


def compare_with_frozen(results: dict[str, dict[str, Any]], times: Mapping[str, Sequence[float]]) -> None:
    """Add to each variant's result the quantiles of its times, and its ratios to the frozen model in time and bytes.

    Args:
        results: they hold `saved_bytes`.
        times: the milliseconds of each variant's steps.
    """
    floor = statistics.median(times["frozen"])
    for name, row in results.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        row.update(step_ms={"q25": low, "median": middle, "q75": high}, of_floor=middle / floor)
        row["saved_of_floor"] = row["saved_bytes"] / results["frozen"]["saved_bytes"]


COLUMNS = ["variant", "trainable", "ms", "of the floor", "saved, MiB", "peak, MiB", "compile, s", "break-even, steps"]


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
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants (all)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    # Code in the cache of an earlier run would make compilation look quick.
    with fresh_cache():
        results = measure(**settings)
    print_table("Forward and backward", COLUMNS, table(results))
    ours = results.get("sylva")
    if ours is not None:
        print(f"SDDMM alone: {ours['sddmm_ms']:.2f} ms a step, {ours['sddmm_of_floor']:.1%} of the floor")
    if not options.no_write:
        print(f"written to {write_results('step', settings, results)}")
    return results


if __name__ == "__main__":
    main()
