"""Time an optimizer step with write-through on as many weights as LLaMA-7B has, side by side with torch's optimizers.

    python -m benchmarks.optimizer_step                    prints the table and writes benchmarks/results/*.json

The model has 224 bfloat16 weights (32 layers of four 4096 x 4096 and three of 4096 x 11008); 2% of their blocks of size
64 are trained in float32. All variants share the dense weights, because each writes the same values into them. Pages of
a dense weight that no block touches are never written and take no memory.

torch's variants step the blocks and then write them through with the fastest library operations that were found: one
`_foreach_copy_` onto views of all blocks' places, made beforehand, or, compiled, an `index_copy_` of the blocks' rows
(an indexed assignment per weight takes twenty times as long). torch's Muon takes one 2-D parameter for each block; a
batched Muon does the same arithmetic in float32 by one `bmm` for all blocks of a weight.

Variants take turns, step by step, and their results are compared with ours of the same rule before anything is timed.
Each turn also adds one long vector to another in place. This measures the memory bandwidth of the machine at that time,
and the benchmark compares the bandwidth of our AdamW with it. It also counts the arithmetic of Muon's products.
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
ADAMW = ("sylva", "torch fused", "torch foreach", "torch foreach, compiled")
MUON = ("sylva Muon", "torch Muon", "batched Muon")
VARIANTS = (*ADAMW, *MUON)
NS_STEPS = 5


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
    """Return our AdamW and the variants in `names`; all start from the same values and have the same gradients.

    Our Muon steps the same blocks as our AdamW, since both write them into the same dense weights.
    """
    ours = masks.parameters()
    assert masks.model is not None
    states = list(block_states(masks.model).values())
    made = [Variant("sylva", ours, sylva_compile.AdamW(ours, lr=lr, weight_decay=0.01).step)]
    for blocks in ours:
        nn.init.normal_(blocks, std=0.02)
        blocks.grad = torch.randn_like(blocks)
    if "sylva Muon" in names or "torch Muon" in names or "batched Muon" in names:
        made.append(Variant("sylva Muon", ours, sylva_compile.optim.Muon(ours, lr=lr, weight_decay=0.01).step))
    for name in (*ADAMW[1:], *MUON[1:]):
        if name not in names:
            continue
        own = [nn.Parameter(blocks.detach().clone()) for blocks in ours]
        for mine, blocks in zip(own, ours, strict=True):
            mine.grad = blocks.grad
        write = compiled_write_through(states, own) if name.endswith("compiled") else write_through(states, own)

        stepped = stepper(name, own, lr)

        def step(stepped: Callable[[], object] = stepped, write: Callable[[], None] = write) -> None:
            stepped()
            write()

        made.append(Variant(name, own, step))
    return made


def stepper(name: str, own: list[nn.Parameter], lr: float) -> Callable[[], object]:
    """Return the function that steps the blocks of a variant of torch, without write-through."""
    if name == "batched Muon":
        momenta = [torch.zeros_like(blocks) for blocks in own]
        return lambda: batched_muon(own, momenta, lr, 0.01)
    if name == "torch Muon":
        matrices = []
        for blocks in own:
            assert blocks.grad is not None
            for matrix, gradient in zip(blocks.detach(), blocks.grad, strict=True):
                matrices.append(nn.Parameter(matrix))
                matrices[-1].grad = gradient
        return torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step
    fused = name == "torch fused"
    optimizer = torch.optim.AdamW(own, lr=lr, weight_decay=0.01, fused=fused, foreach=not fused)
    return torch.compile(optimizer.step) if name.endswith("compiled") else optimizer.step


@torch.no_grad()
def batched_muon(own: list[nn.Parameter], momenta: list[Tensor], lr: float, weight_decay: float) -> None:
    """Step all blocks `[nnz, b, b]` by Muon, a weight at a time, in float32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    for blocks, momentum in zip(own, momenta, strict=True):
        assert blocks.grad is not None
        momentum.lerp_(blocks.grad, 0.05)
        update = blocks.grad.lerp(momentum, 0.95)
        update /= torch.linalg.matrix_norm(update, keepdim=True).clamp_(min=1e-7)
        for _ in range(NS_STEPS):
            gram = update @ update.mT
            update = torch.baddbmm(update, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), update, beta=a)
        blocks.mul_(1 - lr * weight_decay).sub_(update, alpha=0.2 * lr * blocks.shape[-1] ** 0.5)


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
    """Assert that one step of each variant gives the blocks of ours and writes them into the dense weights."""
    assert masks.model is not None
    states = list(block_states(masks.model).values())
    before = [blocks.detach().clone() for blocks in made[0].blocks]
    results: dict[bool, list[Tensor]] = {}
    for variant in made:
        if variant.blocks is made[0].blocks:
            torch._foreach_copy_([blocks.detach() for blocks in variant.blocks], before)
        variant.step()
        ours = results.setdefault(variant.name in MUON, [blocks.detach().clone() for blocks in variant.blocks])
        # torch's Muon multiplies in bfloat16; a step of 1e-3 is then uncertain in its second digit.
        atol = 1e-4 if variant.name == "torch Muon" else 1e-6
        for state, blocks, wanted in zip(states, variant.blocks, ours, strict=True):
            torch.testing.assert_close(blocks.detach(), wanted, rtol=1e-5, atol=atol)
            assert torch.equal(state._dense_blocks(), blocks.detach().to(state.weight.dtype)), (
                f"{variant.name} of {state.name}"
            )
            state.mark_synced()
        assert not torch.equal(before[0], variant.blocks[0]), f"{variant.name} stepped nothing"


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
    if (muon := rows.get("sylva Muon")) is not None:
        # An iteration has two symmetric products, of which half is computed, and one that is not symmetric.
        operations = NS_STEPS * 2 * 2 * elements * block_size
        muon["gigaflops_needed"] = operations / muon["step_ms"]["median"] / 1e6
        muon["gigaflops_of_the_machine"] = machine_gigaflops(device)
    return {
        "weights": len(states),
        "elements": elements,
        "gigabytes_per_second": moved / ours / 1e6,
        "streaming_gigabytes_per_second": streamed,
        "of_streaming": moved / ours / 1e6 / streamed,
        "variants": rows,
    }


def machine_gigaflops(device: str) -> float:
    """Return the speed of a large float32 product by torch's library, in 1e9 operations a second."""
    a = torch.randn(2048, 2048, device=device)
    return 2 * 2048**3 / min(_milliseconds(lambda: a @ a) for _ in range(5)) / 1e6


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
    if "sylva Muon" in results["variants"]:
        muon = results["variants"]["sylva Muon"]
        print(
            f"Muon: {muon['gigaflops_needed']:.0f} GFLOP/s in a step, of the {muon['gigaflops_of_the_machine']:.0f} of "
            "a large product"
        )
    if not options.no_write:
        print(f"written to {write_results('optimizer_step', settings, results)}")
    return results


if __name__ == "__main__":
    main()
