"""SLoPe's products beside dense ones: the forward pass, the input gradient, and a training step of a layer.

    python -m benchmarks.slope                             prints the table and writes benchmarks/results/*.json
    python -m benchmarks.slope --device cuda --dtype bfloat16
    python -m benchmarks.slope --clock cpu --threads 1     on a machine that others use as well

The forward pass multiplies by an N:M sparse matrix and the input gradient by one that is pruned twice; the weight
gradient is a dense product from which the kept places are gathered. A step is these three products and AdamW on the
kept values; its second operand is gathered from them, as training does it. Dense and sparse take turns, and a ratio is
that of their medians: above 1 is in favour of the sparse one. Results are compared before anything is timed.

`benchmarks.slope_memory` measures the memory of models.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from sylva_compile.kernels.nm import cuda
from sylva_compile.kernels.nm.choice import choose_kernel
from sylva_compile.kernels.nm_codes import columns_of, pack
from sylva_compile.kernels.nm_mm import nm_mm, to_dense
from sylva_compile.kernels.nm_sample import nm_sample
from sylva_compile.kernels.nm_transpose import nm_transpose

ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
"""The largest relative error of a product, by dtype."""


def kept(matrix: Tensor, n: int, m: int) -> Tensor:
    """Return the codes of the n largest of every m neighbours in a row of `matrix [rows, k]`."""
    groups = matrix.abs().unflatten(1, (-1, m))
    order = groups.argsort(dim=2, descending=True, stable=True)[..., :n].sort(dim=2).values
    return pack(order.flatten(1), m)


@dataclass
class Layer:
    """A weight `[out, in]`: the kept values and codes of W∘R, and the codes of (W∘R∘C)ᵀ."""

    values: Tensor
    codes: Tensor
    second_codes: Tensor
    n: int
    m: int

    @classmethod
    def random(cls, shape: tuple[int, int], n: int, m: int, dtype: torch.dtype, device: str) -> "Layer":
        """Prune a random weight of `shape` (out, in) twice."""
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        codes = kept(weight, n, m)
        columns = columns_of(codes, shape[1] // m * n, n, m).long()
        values = weight.gather(1, columns)
        first = torch.full_like(weight, -1.0).scatter_(1, columns, values.abs())
        # Places outside of R come last, zeros inside of it before them.
        return cls(values.to(dtype), codes, kept((first + 1.0).t().contiguous(), n, m), n, m)

    @property
    def features(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs."""
        return self.second_codes.shape[0], self.values.shape[0]

    def dense(self) -> Tensor:
        """Return W∘R, `[out, in]`."""
        return to_dense(self.values, self.codes, self.n, self.m)

    def columns(self) -> Tensor:
        """Return the columns of the values, int64 `[out, in / m * n]`."""
        return columns_of(self.codes, self.values.shape[1], self.n, self.m).long()

    def second(self) -> Tensor:
        """Gather the values of (W∘R∘C)ᵀ, `[in, out / m * n]`."""
        return nm_transpose(self.values, self.codes, self.second_codes, self.n, self.m)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x (W∘R)ᵀ`."""
        return nm_mm(x, self.values, self.codes, self.n, self.m, False)

    def input_gradient(self, gradient: Tensor, second: Tensor) -> Tensor:
        """Return `gY (W∘R∘C)`."""
        return nm_mm(gradient, second, self.second_codes, self.n, self.m, False)

    def weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return `gYᵀ X` at the places of R."""
        return nm_sample(gradient, x, self.codes, self.n, self.m)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def medians(turns: dict[str, Callable[[], object]], repeats: int, device: str, clock: str = "wall") -> dict[str, float]:
    """Return the median milliseconds of each, taking turns, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    now = CLOCKS[clock]
    for _ in range(repeats + 1):
        for name, run in turns.items():
            started = now()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append((now() - started) * 1e3)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def check(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Assert that a product is as precise as its dtype allows, and no product of zeros."""
    error = float((found.double() - exact).norm() / exact.norm())
    assert float(exact.norm()) > 0 and error < ROUNDING[str(dtype).removeprefix("torch.")], (
        f"relative error {error:.1e}"
    )


def adam(values: Tensor) -> Callable[[Tensor], None]:
    """Return AdamW's step on `values`."""
    parameter = torch.nn.Parameter(values)
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, fused=True)

    def step(gradient: Tensor) -> None:
        parameter.grad = gradient
        optimizer.step()
        parameter.grad = None

    return step


def time_row(layer: Layer, tokens: int, threads: int, repeats: int, device: str, clock: str = "wall") -> dict[str, Any]:
    """Time one shape: milliseconds of dense and sparse products and steps, and their ratios."""
    torch.set_num_threads(threads)
    (inputs, outputs), dtype = layer.features, layer.values.dtype
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(tokens, k, generator=generator).to(device, dtype) for k in (inputs, outputs))
    weight, second = layer.dense(), layer.second()
    twice = to_dense(second, layer.second_codes, layer.n, layer.m).t().contiguous()
    assert torch.equal(twice, weight.where(twice != 0, 0)), "C keeps what R does not"
    # Products in float64 take long, so some tokens at both ends are compared, and some rows of the weight gradient.
    ends = [*range(min(tokens, 64)), *range(max(tokens - 64, 0), tokens)]
    check(layer.forward(x)[ends], x[ends].double() @ weight.double().t(), dtype)
    check(layer.input_gradient(gradient, second)[ends], gradient[ends].double() @ twice.double(), dtype)
    exact = (gradient[:, -64:].double().t() @ x.double()).gather(1, layer.columns()[-64:])
    check(layer.weight_gradient(gradient, x)[-64:], exact, dtype)

    dense_adam, sparse_adam = adam(weight.clone()), adam(layer.values.clone())

    def dense_step() -> None:
        _ = x @ weight.t(), gradient @ weight
        dense_adam(gradient.t() @ x)

    def sparse_step() -> None:
        _ = layer.forward(x), layer.input_gradient(gradient, layer.second())
        sparse_adam(layer.weight_gradient(gradient, x))

    turns: dict[str, Callable[[], object]] = {
        "forward dense": lambda: x @ weight.t(),
        "forward sparse": lambda: layer.forward(x),
        "input dense": lambda: gradient @ twice,
        "input sparse": lambda: layer.input_gradient(gradient, second),
        "step dense": dense_step,
        "step sparse": sparse_step,
    }
    if device == "cuda" and cuda.missing(outputs, inputs, layer.n, layer.m, dtype, x.device) is None:
        packed = cuda.compress(layer.values, layer.codes, layer.n, layer.m)
        check(nm_mm(x, *packed, layer.n, layer.m, False)[ends], x[ends].double() @ weight.double().t(), dtype)
        turns["forward compressed"] = lambda: nm_mm(x, *packed, layer.n, layer.m, False)
    ms = medians(turns, repeats, device, clock)
    ratios = {name: ms[f"{name} dense"] / ms[f"{name} sparse"] for name in ("forward", "input", "step")}
    if "forward compressed" in ms:
        ratios["compressed"] = ms["forward dense"] / ms["forward compressed"]
    shape = {"in": inputs, "out": outputs, "tokens": tokens, "pattern": f"{layer.n}:{layer.m}", "threads": threads}
    choices = {
        "forward": choose_kernel(tokens, outputs, inputs, layer.n, layer.m, dtype, device),
        "input": choose_kernel(tokens, inputs, outputs, layer.n, layer.m, dtype, device),
    }
    return {**shape, "ratio": ratios, "ms": ms, "chosen": {name: vars(one) for name, one in choices.items()}}


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""

    def pair(separator: str) -> Callable[[str], tuple[int, int]]:
        def parse(text: str) -> tuple[int, int]:
            first, second = map(int, text.split(separator))
            return first, second

        return parse

    parser = parser_of(__spec__, __doc__)
    shapes = ["768x768", "768x3072", "1024x4096", "2048x2048", "4096x1024", "4096x4096"]
    parser.add_argument("--shapes", nargs="+", type=pair("x"), default=list(map(pair("x"), shapes)), help="in x out")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="%(default)s")
    parser.add_argument("--patterns", nargs="+", type=pair(":"), default=[(2, 4)], help="n:m (2:4)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="%(default)s")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="%(default)s")
    parser.add_argument("--dtype", default="float32", choices=list(ROUNDING), help="%(default)s")
    parser.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: this process's time, on one thread (%(default)s)"
    )
    parser.add_argument("--largest", type=float, default=math.inf, help="GFLOP of a dense product that is timed")
    parser.add_argument("--repeats", type=int, default=7, help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != [1]):
        parser.error("--clock cpu adds up the time of all threads, and misses that of GPUs; use --threads 1.")
    return options


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Measure, print the table and write the results; return the rows of the table."""
    options = options_of(argv)
    threads_before = torch.get_num_threads()
    times = []
    for (n, m), (inputs, outputs) in itertools.product(options.patterns, options.shapes):
        layer = Layer.random((outputs, inputs), n, m, getattr(torch, options.dtype), options.device)
        for tokens, threads in itertools.product(options.tokens, options.threads):
            if 2e-9 * tokens * inputs * outputs <= options.largest:
                times.append(time_row(layer, tokens, threads, options.repeats, options.device, options.clock))
    torch.set_num_threads(threads_before)
    shown = ["forward", "input", "step", *(["compressed"] if options.device == "cuda" else [])]
    print_table(
        "Speed of sparse products and steps, in multiples of the dense ones'",
        ["in x out", "pattern", "tokens", "threads", *shown, "kernels"],
        [
            [
                *(f"{row['in']} x {row['out']}", row["pattern"], str(row["tokens"]), str(row["threads"])),
                *(f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "-" for name in shown),
                ", ".join(one["kernel"] for one in row["chosen"].values()),
            ]
            for row in times
        ],
    )
    results = {"times": times}
    if not options.no_write:
        settings = {key: value for key, value in vars(options).items() if key not in ("no_write", "largest")}
        settings["cusparselt"] = cuda.version()
        print(f"written to {write_results('slope', settings, results)}")
    return results


if __name__ == "__main__":
    main()
