"""Compare updates of many layers' online hierarchies, one by one and together: time and number of operations.

    python -m benchmarks.grouped_updates                 prints the table and writes benchmarks/results/*.json
    python -m benchmarks.grouped_updates --device cuda

Both take the same tokens in turns, and their sums are compared before anything is timed. The time of "together"
includes a copy of the tokens, since an update queue stores copies. Operations are those that reach PyTorch's
dispatcher: on a GPU each of them launches at least one kernel, and QR and SVD launch several.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from sylva_compile.curvature.online import OnlineHierarchy, update_together

Update = Callable[[list[OnlineHierarchy], list[Tensor]], None]


class Operations(TorchDispatchMode):
    """A dispatch mode that counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it, unless it only makes a view."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def one_by_one(trees: list[OnlineHierarchy], tokens: list[Tensor]) -> None:
    """Update each hierarchy by itself, as a trace on a CPU does."""
    for tree, one in zip(trees, tokens, strict=True):
        tree.update(one)


def together(trees: list[OnlineHierarchy], tokens: list[Tensor]) -> None:
    """Update all hierarchies in one call, as an update queue does."""
    update_together(trees, [tree.layout.spread(one.clone(), 1) for tree, one in zip(trees, tokens, strict=True)])


def measure(options: argparse.Namespace, tokens: int, layers: int) -> dict[str, Any]:
    """Return the median milliseconds and the operations of an update of `layers` factors."""
    device = torch.device(options.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    variants: dict[str, Update] = {"one_by_one": one_by_one, "together": together}
    trees = {
        name: [OnlineHierarchy(options.size, options.depth, options.rank, device=device) for _ in range(layers)]
        for name in variants
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    operations: dict[str, int] = {}
    for turn in range(options.repeats + 1):
        data = [torch.randn(tokens, options.size, device=device) for _ in range(layers)]
        for name, update in variants.items():
            counted = Operations()
            wait()
            start = time.perf_counter()
            if turn == 0:
                with counted:
                    update(trees[name], data)
                operations[name] = counted.count
            else:
                update(trees[name], data)
                wait()
                seconds[name].append(time.perf_counter() - start)
        if turn == 0:
            for pair in zip(*trees.values(), strict=True):
                first, second = (tree.hierarchy().dense() for tree in pair)
                assert float((first - second).norm() / first.norm()) < 1e-5
    times = {name: 1000 * statistics.median(found) for name, found in seconds.items()}
    shape = {"tokens": tokens, "layers": layers}
    return {**shape, "ms": times, "operations": operations, "ratio": times["together"] / times["one_by_one"]}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--size", type=int, default=768, help="%(default)s")
    parser.add_argument("--depth", type=int, default=4, help="%(default)s")
    parser.add_argument("--rank", type=int, default=8, help="%(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048], help="%(default)s")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results = [measure(options, tokens, layers) for tokens in options.tokens for layers in options.layers]
    rows = [
        [
            f"{found['tokens']} tokens, {found['layers']} layers",
            *(f"{value:.1f}" for value in found["ms"].values()),
            f"{found['ratio']:.2f}",
            *(str(value) for value in found["operations"].values()),
        ]
        for found in results
    ]
    columns = ["", "ms, one by one", "ms, together", "ratio", "operations, one by one", "together"]
    print_table(f"Updates of hierarchies, size {options.size}, on {options.device}", columns, rows)
    if not options.no_write:
        settings = {key: value for key, value in vars(options).items() if key != "no_write"}
        print(f"written to {write_results('grouped_updates', settings, results)}")
    return results


if __name__ == "__main__":
    main()
