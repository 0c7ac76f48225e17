"""Compare the SDDMM alone with a dense GEMM of as many FLOPs, and on CUDA with the roofline of its bytes and FLOPs.

    python -m benchmarks.sddmm                             prints the table and writes benchmarks/results/*.json
    python -m benchmarks.sddmm --device cuda --tune        rewrites sylva_compile/kernels/sddmm/configs.json

The GEMM multiplies `[d, T] x [T, d]` with d² = blocks · b²: the same work without sparsity. The bytes are those of the
panels that at least one block reads, each counted once, and of the result. The roofline's two slopes are measured on
the same device, by a large GEMM in the same dtype and by a large copy.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import parser_of
from benchmarks.report import machine, print_table, write_results
from sylva_compile.kernels.sddmm.configs import MANY, PANELS, TABLE, Config, choose_config, config_key
from sylva_compile.kernels.sddmm.cpu import sddmm_by_products
from sylva_compile.kernels.sddmm.op import sddmm, sddmm_reference
from sylva_compile.kernels.sddmm.triton_kernel import sddmm_shared_triton


def median_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median milliseconds of `repeats` runs, after two warm-up runs.

    On CUDA, a recorded graph is replayed between two events, and the cache is flushed before each replay. This measures
    the GPU alone, without the time that Python takes to launch the kernels.
    """
    if device == "cuda":
        return _median_ms_cuda(run, repeats)
    found = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        run()
        found.append((time.perf_counter() - started) * 1e3)
    return statistics.median(found[2:])


def _median_ms_cuda(run: Callable[[], object], repeats: int) -> float:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found = []
    for _ in range(repeats + 2):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found[2:])


def call_us(run: Callable[[], object], calls: int = 200) -> float:
    """Return the microseconds that Python takes to launch one run; it does not wait until the GPU is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        run()
    taken = time.perf_counter() - started
    torch.cuda.synchronize()
    return taken / calls * 1e6


def operands(tokens: int, size: int, block: int, share: float, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Make `lhs [T, size]`, `rhs [T, size]` and `positions [2, blocks]`, a random `share` of blocks, at least one."""
    generator = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(tokens, size, generator=generator).to(device, dtype) for _ in range(2))
    grid = -(-size // block)
    chosen = torch.randperm(grid * grid, generator=generator)[: max(1, round(share * grid * grid))].sort().values
    return lhs, rhs, torch.stack([chosen // grid, chosen % grid]).to(device)


def check(lhs: Tensor, rhs: Tensor, positions: Tensor, block: int) -> None:
    """Assert that the kernel's error against float64 is at most a few roundings of float32 (TF32 is off here)."""
    found = sddmm(lhs, rhs, positions, block).double()
    exact = sddmm_reference(lhs.double(), rhs.double(), positions, block)
    magnitude = sddmm_reference(lhs.double().abs(), rhs.double().abs(), positions, block)
    worst = float(((found - exact).abs() / magnitude.clamp(min=1e-30)).max())
    assert worst < 1e-5, f"{lhs.dtype}, b={block}: relative error {worst:.1e}"


def slopes(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Return the FLOP/ms of a large GEMM and the bytes/ms of a large copy on this device."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.int8, device=device)
    other = torch.empty_like(big)
    flops = 2 * size**3 / median_ms(lambda: a @ b, device, 10)
    return flops, 2 * big.numel() / median_ms(lambda: other.copy_(big), device, 10)


def row(tokens: int, size: int, block: int, share: float, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """Return the times of one shape, and their ratios to the GEMM and, on CUDA, to the roofline."""
    lhs, rhs, positions = operands(tokens, size, block, share, dtype, device)
    check(lhs, rhs, positions, block)
    blocks = positions.shape[1]
    d = round(math.sqrt(blocks) * block)
    a, b = (torch.randn(tokens, d, device=device).to(dtype) for _ in range(2))
    found = {
        "sddmm_ms": median_ms(lambda: sddmm(lhs, rhs, positions, block), device, repeats),
        "gemm_ms": median_ms(lambda: a.t() @ b, device, repeats),
    }
    if device == "cpu":
        found["loop_ms"] = median_ms(lambda: sddmm_by_products(lhs, rhs, positions, block), device, repeats)
    else:
        flop_rate, byte_rate = slopes(dtype, device)
        panels = positions[0].unique().numel() + positions[1].unique().numel()
        moved = tokens * panels * block * lhs.element_size() + blocks * block**2 * 4
        least = max(2 * tokens * blocks * block**2 / flop_rate, moved / byte_rate)
        found["of_roofline"] = least / found["sddmm_ms"]
        found["call_us"] = call_us(lambda: sddmm(lhs, rhs, positions, block))
    shape = {"dtype": str(dtype), "tokens": tokens, "size": size, "block": block, "share": share, "blocks": blocks}
    return {**shape, **found, "of_gemm": found["sddmm_ms"] / found["gemm_ms"]}


def launches(dtype: torch.dtype, panel: int, tokens: int) -> dict[Config, Callable[[], object]]:
    """Return every launch that is tried for one entry of the table, by its configuration."""
    lhs, rhs, positions = operands(tokens, 4096, panel, 0.02, dtype, "cuda")
    return {
        config: functools.partial(sddmm_shared_triton, [lhs], rhs, [positions], panel, config=config)
        for config in itertools.starmap(Config, itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4)))
    }


def compile_ahead(dtype: torch.dtype, panel: int, tokens: int) -> None:
    """Compile an entry's kernels into Triton's cache; skip those that do not fit the GPU."""
    for launch in launches(dtype, panel, tokens).values():
        with contextlib.suppress(Exception):
            launch()


def tune() -> None:
    """Measure every entry of the table of launch configurations that the Triton SDDMM reads, and write the table."""
    configs: dict[str, Any] = {}
    entries = [*itertools.product((torch.float32, torch.bfloat16, torch.float16), PANELS, (2048, 4 * MANY))]
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), get_context("spawn")) as processes:
        list(processes.map(compile_ahead, *zip(*entries, strict=True)))
    for dtype, panel, tokens in entries:
        times = {}
        for config, launch in launches(dtype, panel, tokens).items():
            try:
                times[config] = median_ms(launch, "cuda", 10)
            except Exception as error:  # a tile that does not fit is no candidate; Triton raises many types of error
                print(f"{dtype}, {panel}, {config}: {type(error).__name__}")
        best = min(times, key=times.__getitem__)
        key = config_key(dtype, panel, tokens)
        configs[key] = vars(best)
        before = times.get(choose_config(dtype, panel, tokens), math.nan)
        print(f"{key}: {best}, {times[best]:.4f} ms; as the table was, {before:.4f} ms")
    TABLE.write_text(json.dumps({"measured_on": machine()["gpu"], "configs": configs}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the results; with `--tune`, write the table of launches instead."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="%(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="%(default)s")
    parser.add_argument("--size", type=int, default=1024, help="of both sides of the weight (%(default)s)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32, 64, 128], help="block sizes (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.1, 1.0], help="of all blocks (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    parser.add_argument("--tune", action="store_true", help="write the table of launches instead")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    if options.tune:
        tune()
        return []
    fixed = (options.device, options.repeats)
    results = [
        row(options.tokens, options.size, block, share, getattr(torch, dtype), *fixed)
        for dtype, block, share in itertools.product(options.dtypes, options.blocks, options.shares)
    ]
    others = ["loop_ms"] if options.device == "cpu" else ["of_roofline", "call_us"]
    columns = ["dtype", "block", "share", "blocks", "sddmm_ms", "gemm_ms", "of_gemm", *others]
    shown = [[f"{r[c]:.3f}" if isinstance(r[c], float) else str(r[c]) for c in columns] for r in results]
    print_table(f"SDDMM, {options.tokens} tokens, weight {options.size} x {options.size}", columns, shown)
    if not options.no_write:
        settings = {key: value for key, value in vars(options).items() if key not in ("no_write", "tune")}
        print(f"written to {write_results('sddmm', settings, results)}")
    return results


if __name__ == "__main__":
    main()
