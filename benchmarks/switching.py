"""Time what changes or reads the values of a whole model in place: its base for a while, another adapter, the changes.

    python -m benchmarks.switching                    prints the table and writes benchmarks/results/*.json

The model has 224 bfloat16 weights of the shapes of LLaMA-7B's and no forward pass; they are zeros, whose pages take no
memory where no block is. Two adapters train 2% of the blocks of size 64, at different places. Before anything is timed,
the blocks' places are compared: with zeros while the base is shown, and after a switch there and back with what they
were before.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.optimizer_step import HIDDEN, LAYERS, MLP, masks_for, shapes_of_llama
from benchmarks.report import print_table, write_results
from sylva_compile.blocks.embed import block_states
from sylva_compile.kernels.blocks import read_blocks


class Zeros(nn.Module):
    """Dense weights of zeros without a forward pass."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
            self.register_parameter(f"w{number}", weight)


def with_two_adapters(shapes: Sequence[tuple[int, int]], block_size: int, sparsity: float) -> nn.Module:
    """Return a model with the adapters "first", which is active, and "second"."""
    model = Zeros(shapes)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            masks = masks_for(model, block_size, sparsity)
            masks.embed(model)
            with torch.no_grad():
                for blocks in masks.parameters():
                    blocks.normal_(std=0.02)
            sylva_compile.save_adapter(model, Path(folder) / name)
            sylva_compile.unload_adapter(model)
        for name in ("first", "second"):
            sylva_compile.load_adapter(model, Path(folder) / name, name)
    return model


def at_the_blocks(model: nn.Module) -> list[Tensor]:
    """Return what the dense weights hold at the places of the active adapter's blocks."""
    return [
        read_blocks(state.weight.detach(), state.mask.positions, state.mask.block_size).clone()
        for state in block_states(model).values()
    ]


def check(model: nn.Module) -> None:
    """Raise AssertionError unless values go and come back."""
    before = at_the_blocks(model)
    assert all(bool(values.any()) for values in before)
    with sylva_compile.disable_adapter(model):
        assert not any(bool(values.any()) for values in at_the_blocks(model))
    sylva_compile.set_adapter(model, "second")
    assert not all(torch.equal(*pair) for pair in zip(before, at_the_blocks(model), strict=True))
    sylva_compile.set_adapter(model, "first")
    assert all(torch.equal(*pair) for pair in zip(before, at_the_blocks(model), strict=True))


def actions_of(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name; each leaves the model as another turn needs it."""

    def base() -> None:
        with sylva_compile.disable_adapter(model):
            pass

    def switch() -> None:
        other = "second" if sylva_compile.active_adapter(model) == "first" else "first"
        sylva_compile.set_adapter(model, other)

    def changes() -> None:
        for _ in sylva_compile.changed_values(model):
            pass

    return {"disable_adapter, in and out": base, "set_adapter": switch, "changed_values": changes}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the benchmark and return the median milliseconds by action."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of seven weights (%(default)s)")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="hidden size (%(default)s)")
    parser.add_argument("--mlp", type=int, default=MLP, help="size of the MLP (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.98, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    shapes = shapes_of_llama(options.layers, options.hidden, options.mlp)
    model = with_two_adapters(shapes, options.block_size, options.sparsity)
    check(model)
    actions = actions_of(model)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(options.repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(1e3 * (time.perf_counter() - started))
    results = {name: statistics.median(column) for name, column in times.items()}
    trained = sum(state.blocks.numel() for state in block_states(model).values())
    print_table(
        f"{len(shapes)} bfloat16 weights, {trained:,} elements in blocks of {options.block_size}",
        ["in place", "ms, median", "ms, least", "ms, most"],
        [[name, *(f"{f(times[name]):.1f}" for f in (statistics.median, min, max))] for name in actions],
    )
    path = write_results("switching", vars(options), {"trained": trained, "milliseconds": times})
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    main()
