"""Time an optimizer step with write-through on as many weights as LLaMA-7B has, side by side with torch's optimizers.

    python -m benchmarks.optimizer_step                    prints the table and writes benchmarks/results/*.json

The model has 224 bfloat16 weights (32 layers of four 4096 x 4096 and three of 4096 x 11008); 2% of their blocks of size
64 are trained in float32. All variants share the dense weights, because each writes the same values into them. Pages of
a dense weight that no block touches are never written and take no memory.

torch's variants step the blocks and then write them through with the fastest library operations that were found: one
`_foreach_copy_` onto views of all blocks' places, made beforehand, or, compiled, an `index_copy_` of the blocks' rows
(an indexed assignment per weight takes twenty times as long). Variants take turns, step by step, and their results are
compared before anything is timed. Each turn also adds one long vector to another in place. This measures the memory
bandwidth of the machine at that time, and the benchmark compares the bandwidth of our step with it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from sylva_compile import Masks
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states

HIDDEN, MLP, LAYERS = 4096, 11008, 32
STREAMED = 1 << 25
"""The number of elements of each of two float32 vectors, which are too large for any cache."""
VARIANTS = ("sylva", "torch fused", "torch foreach", "torch foreach, compiled")


@dataclass
class Variant:
    """An optimizer with its own blocks, and the function that steps it.

    Attributes:
        name: one of VARIANTS.
        blocks: the trained blocks of each weight, `[nnz, b, b]`.
        step: steps the blocks and writes them through to the dense weights.
    """

    name: str
    blocks: list[nn.Parameter]
    step: Callable[[], None]


class Weights(nn.Module):
    """Dense weights without a forward pass; their memory is not initialised, only blocks are written to it."""

    def __init__(self, shapes: list[tuple[int, int]], device: str) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            self.register_parameter(f"w{number}", nn.Parameter(weight, requires_grad=False))


def shapes_of_llama(layers: int, hidden: int, mlp: int) -> list[tuple[int, int]]:
    """Return the shapes of the linear weights of `layers` Llama layers."""
    return [(hidden, hidden)] * 4 * layers + [(mlp, hidden)] * 2 * layers + [(hidden, mlp)] * layers


def masks_for(model: nn.Module, block_size: int, sparsity: float) -> Masks:
    """Return random masks that keep `1 - sparsity` of the blocks of each weight, at least one."""
    maps = {}
    for name, weight in model.named_parameters():
        grid = [-(-size // block_size) for size in weight.shape]
        count = max(1, round((1 - sparsity) * grid[0] * grid[1]))
        flat = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        flat[torch.randperm(len(flat))[:count]] = True
        maps[name] = flat.view(grid)
    return Masks.from_block_maps(model, maps, block_size)


def variants(masks: Masks, lr: float, names: Sequence[str] = VARIANTS) -> list[Variant]:
    """Return our variant and those in `names`; all start from the same values and have the same gradients."""
    ours = masks.parameters()
    assert masks.model is not None
    states = list(block_states(masks.model).values())
    made = [Variant("sylva", ours, sylva_compile.AdamW(ours, lr=lr, weight_decay=0.01).step)]
    for blocks in ours:
        nn.init.normal_(blocks, std=0.02)
        blocks.grad = torch.randn_like(blocks)
    for name in VARIANTS[1:]:
        if name not in names:
            continue
        own = [nn.Parameter(blocks.detach().clone()) for blocks in ours]
        for mine, blocks in zip(own, ours, strict=True):
            mine.grad = blocks.grad
        fused = name == "torch fused"
        optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.01, fused=fused, foreach=not fused)
        compiled = name.endswith("compiled")
        write = compiled_write_through(states, own) if compiled else write_through(states, own)
        stepped: Any = torch.compile(optimizer.step) if compiled else optimizer.step

        def step(stepped: Any = stepped, write: Callable[[], None] = write) -> None:
            stepped()
            write()

        made.append(Variant(name, own, step))
    return made


def write_through(states: list[BlockState], blocks: list[nn.Parameter]) -> Callable[[], None]:
    """Return a function that copies every block onto a view of its place in the dense weight, in a single call."""
    places, values = [], []
    for state, of_weight in zip(states, blocks, strict=True):
        b = state.mask.block_size
        for row, col in zip(state.mask.rows.tolist(), state.mask.cols.tolist(), strict=True):
            places.append(state.weight.detach()[row * b : (row + 1) * b, col * b : (col + 1) * b])
        values += of_weight.detach().unbind(0)
    return lambda: torch._foreach_copy_(places, values)


def compiled_write_through(states: list[BlockState], blocks: list[nn.Parameter]) -> Callable[[], None]:
    """Return a function that runs a compiled copy per weight: the blocks' rows, into the weight viewed as `[-1, b]`."""

    def copy(weight: Tensor, values: Tensor, rows: Tensor) -> None:
        b = values.shape[-1]
        weight.view(-1, b).index_copy_(0, rows, values.to(weight.dtype).view(-1, b))

    compiled = torch.compile(copy, dynamic=False)
    work = []
    for state, of_weight in zip(states, blocks, strict=True):
        b, across = state.mask.block_size, state.mask.shape[1] // state.mask.block_size
        top, left = state.layout.positions
        rows = ((top[:, None] * b + torch.arange(b, device=top.device)) * across + left[:, None]).flatten()
        work.append((state.weight.detach(), of_weight.detach(), rows))

    def write() -> None:
        for arguments in work:
            compiled(*arguments)

    return write


def assert_equal_results(made: list[Variant], masks: Masks) -> None:
    """Assert that one step of each variant gives the same blocks and writes them into the dense weights."""
    assert masks.model is not None
    states = list(block_states(masks.model).values())
    before = made[0].blocks[0].detach().clone()
    for variant in made:
        variant.step()
        for state, blocks, wanted in zip(states, variant.blocks, made[0].blocks, strict=True):
            torch.testing.assert_close(blocks.detach(), wanted.detach(), rtol=1e-5, atol=1e-6)
            assert torch.equal(state._dense_blocks(), blocks.detach().to(state.weight.dtype)), (
                f"{variant.name} of {state.name}"
            )
            state.mark_synced()
    assert not torch.equal(before, made[0].blocks[0]), "nothing was stepped"


def measure(
    layers: int,
    hidden: int,
    mlp: int,
    block_size: int,
    sparsity: float,
    device: str,
    repeats: int,
    names: Sequence[str] = VARIANTS,
) -> dict[str, Any]:
    """Return the quantiles of each variant's step time, and the bandwidth that our step reaches."""
    torch.manual_seed(0)
    model = Weights(shapes_of_llama(layers, hidden, mlp), device)
    masks = masks_for(model, block_size, sparsity)
    made = variants(masks, 1e-3, names)
    assert_equal_results(made, masks)
    states = list(block_states(model).values())
    streams = torch.ones(2, STREAMED, device=device)
    times: dict[str, list[float]] = {variant.name: [] for variant in made}
    streaming: list[float] = []
    gc.disable()
    try:
        for turn in range(repeats + 2):
            # Each turn begins with another variant, so that no variant always runs right after the same one.
            for variant in made[turn % len(made) :] + made[: turn % len(made)]:
                taken = _milliseconds(variant.step)
                if turn >= 2:
                    times[variant.name].append(taken)
                for state in states:
                    # The weights now hold this variant's blocks; our next step must not take them for an edit by hand.
                    state.mark_synced()
            streaming.append(_milliseconds(lambda: streams[0].add_(streams[1])))
    finally:
        gc.enable()
    elements = sum(blocks.numel() for blocks in made[0].blocks)
    rows: dict[str, Any] = {}
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        rows[name] = {"step_ms": {"q25": low, "median": middle, "q75": high}}
    ours = rows["sylva"]["step_ms"]["median"]
    for row in rows.values():
        row["of_sylva"] = row["step_ms"]["median"] / ours
    # A step reads parameter, gradient and two states, and writes parameter, two states and the bfloat16 weight.
    moved = elements * (7 * 4 + 2)
    # The addition reads two vectors and writes one.
    streamed = 3 * 4 * STREAMED / statistics.median(streaming[2:]) / 1e6
    return {
        "weights": len(states),
        "elements": elements,
        "gigabytes_per_second": moved / ours / 1e6,
        "streaming_gigabytes_per_second": streamed,
        "of_streaming": moved / ours / 1e6 / streamed,
        "variants": rows,
    }


def _milliseconds(work: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return (time.perf_counter() - started) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, help="%(default)s")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=MLP, help="%(default)s")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--sparsity", type=float, default=0.98, help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="%(default)s")
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside ours (all)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    results = measure(**settings)
    rows = [
        [name, f"{row['step_ms']['median']:.1f}", f"{row['of_sylva']:.2f}"] for name, row in results["variants"].items()
    ]
    print_table("Optimizer step and write-through", ["variant", "ms", "of sylva"], rows)
    print(
        f"{results['weights']} weights, {results['elements']:,} elements, {results['gigabytes_per_second']:.1f} GB/s, "
        f"{results['of_streaming']:.0%} of the {results['streaming_gigabytes_per_second']:.1f} GB/s of adding vectors"
    )
    if not options.no_write:
        print(f"written to {write_results('optimizer_step', settings, results)}")
    return results


if __name__ == "__main__":
    main()
