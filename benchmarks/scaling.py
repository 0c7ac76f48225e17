"""Compute what a step would take on 1 to 1,024 processes: measured or given compute, and counted bytes over a ring.

    python -m benchmarks.scaling                                      measure the compute of a small Llama here
    python -m benchmarks.scaling --kept step-20261126T011020 --layers 32     that of a kept result, times the layers
    python -m benchmarks.scaling --model Llama-3-8B --step-ms 700 820 690    that of full, LoRA and blocks, as given

Nothing is sent. The bytes that each process of N exchanges a step are counted from shapes; tests compare them with the
bytes that collectives carry on two and three processes. With T bytes in a message, as large as the whole tensor, and a
link of B bytes a second in each direction (1 Gbit/s = 1.25e8 bytes a second), a ring takes

    all-reduce                     2 (N - 1) / N * T / B  seconds
    all-gather, reduce-scatter       (N - 1) / N * T / B  seconds

without latencies, which grow with N, and with one link of that speed for each process.

| method | all-reduce | all-gather | reduce-scatter |
| --- | --- | --- | --- |
| DistributedDataParallel | gradients | | |
| FSDP2, full | | layers twice, the rest once | gradients |
| FSDP2, blocks embedded before | | the same, blocks too, and all blocks after the step | gradients of blocks |
| FSDP2, blocks embedded after | gradients of blocks | layers twice, the rest once | |

Gradients have the dtype of their parameters: blocks and LoRA's are float32. Buffers, which DistributedDataParallel
broadcasts, are not counted. FSDP2 pads the first dimension of each parameter to a multiple of N. A step takes at least
the larger one of compute and messages, if all of them run beside each other, and at most the sum; the tables show both.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.command import parser_of
from benchmarks.model_shapes import DENSE, Llama
from benchmarks.report import print_table, write_results
from benchmarks.step import one_step, take_turns
from benchmarks.variants import available, llama, variants
from sylva_compile.config import SylvaConfig
from sylva_compile.kernels.blocks import grid_shape

LINKS = {"15 Gbit/s": 15.0, "100 Gbit/s": 100.0, "NVLink": 3600.0}
"""Gbit/s in each direction: rated speeds, not measured ones. NVLink is that of its fourth generation, 450 GB/s."""
RANKS = (1, 2, 8, 64, 256, 1024)
COMPUTE = {
    "full, DDP": "full",
    "LoRA, DDP": "lora",
    "blocks, DDP": "sylva",
    "full, FSDP2": "full",
    "blocks embedded before, FSDP2": "sylva",
    "blocks embedded after, FSDP2": "sylva",
}
"""The methods, and the variant of `benchmarks.variants` whose compute each one has."""
_FLOAT32 = 4


@dataclass(frozen=True)
class Traffic:
    """The bytes of a step's messages, each as large as the whole tensor."""

    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    def sent(self, ranks: int) -> float:
        """Return the bytes that each of `ranks` processes sends on a ring."""
        return (ranks - 1) / ranks * (2 * self.all_reduce + self.all_gather + self.reduce_scatter)

    def seconds(self, ranks: int, gbit: float) -> float:
        """Return the time of these messages on a ring of `ranks` processes with links of `gbit` Gbit/s."""
        return self.sent(ranks) / (gbit * 1.25e8)


def blocks_of(model: Llama, config: SylvaConfig) -> Iterator[tuple[int, int, int]]:
    """Yield the shape `[nnz, b, b]` of the blocks of each weight."""
    b = config.block_size
    for _, shape in model.weights():
        rows, columns = grid_shape(shape, b)
        yield config.blocks(rows * columns), b, b


def rank_of_lora(model: Llama, config: SylvaConfig) -> int:
    """Return the rank at which LoRA has as many parameters as there are trained values, up to one rank."""
    trained = sum(count * b * b for count, b, _ in blocks_of(model, config))
    return max(1, round(trained / sum(m + n for _, (m, n) in model.weights())))


def traffic(method: str, model: Llama, config: SylvaConfig, ranks: int, width: int) -> Traffic:
    """Count the bytes of a step.

    Args:
        method: one of COMPUTE.
        model: its shapes.
        config: block size and sparsity.
        ranks: the number of processes; FSDP2 pads to a multiple of it.
        width: bytes of a value of the model.
    """
    layers: list[tuple[int, ...]] = [shape for _, shape in model.weights()]
    layers += [(model.hidden,)] * 2 * model.layers
    rest: list[tuple[int, ...]] = [(model.vocabulary, model.hidden)] * (1 if model.tied else 2) + [(model.hidden,)]
    blocks = list(blocks_of(model, config))
    if method == "full, DDP":
        return Traffic(all_reduce=_bytes([*layers, *rest], width))
    if method == "LoRA, DDP":
        factors = rank_of_lora(model, config) * sum(m + n for _, (m, n) in model.weights())
        return Traffic(all_reduce=_FLOAT32 * factors)
    if method == "blocks, DDP":
        return Traffic(all_reduce=_bytes(blocks, _FLOAT32))
    gathered = 2 * _bytes(layers, width, ranks) + _bytes(rest, width, ranks)
    if method == "full, FSDP2":
        return Traffic(all_gather=gathered, reduce_scatter=_bytes([*layers, *rest], width, ranks))
    if method == "blocks embedded before, FSDP2":
        own = _bytes(blocks, _FLOAT32, ranks)
        return Traffic(all_gather=gathered + 3 * own, reduce_scatter=own)
    assert method == "blocks embedded after, FSDP2", method
    return Traffic(all_reduce=_bytes(blocks, _FLOAT32), all_gather=gathered)


def _bytes(shapes: Sequence[tuple[int, ...]], width: int, ranks: int = 1) -> int:
    """Return the bytes of tensors whose first dimension is padded to a multiple of `ranks`."""
    padded = (torch.Size((-(-first // ranks) * ranks, *others)).numel() for first, *others in shapes)
    return width * sum(padded)


def measured(shapes: Llama, config: SylvaConfig, tokens: int, repeats: int, inner: str) -> dict[str, float]:
    """Return the median milliseconds of forward and backward pass on this CPU, float32, by variant."""
    torch.manual_seed(0)
    base = llama(shapes.hidden, shapes.mlp, shapes.layers)
    ids = torch.randint(0, base.config.vocab_size, (max(1, tokens // 256), min(tokens, 256)))
    ready = []
    names = available(("sylva", "lora", "full"))
    sizes = {"block_size": config.block_size, "sparsity": config.sparsity}
    for variant in variants(base, ids, **sizes, inner=inner, names=names):  # type: ignore[arg-type]
        one_step(variant)
        variant.gradients()
        ready.append(variant)
    return {name: statistics.median(column) for name, column in take_turns(ready, repeats).items()}


def from_kept(name: str, layers: int) -> tuple[Llama, SylvaConfig, int, dict[str, float], str]:
    """Return shapes, settings, bytes of a value, compute and its origin from a kept result of `benchmarks.step`.

    Its model has some decoder layers and nothing beside them that is worth counting, and so have the shapes.
    """
    row = json.loads((report.RESULTS / f"{name}.json").read_text())
    settings, times = row["settings"], row["results"]
    heads = settings["hidden"] // 64
    shapes = Llama(settings["hidden"], settings["mlp"], layers, heads, heads, 64, vocabulary=0, tied=True)
    config = SylvaConfig(method="random", block_size=settings["block_size"], sparsity=settings["sparsity"])
    factor = layers / settings["layers"]
    compute = {each: factor * found["step_ms"]["median"] for each, found in times.items()}
    machine = row["machine"]
    origin = (
        f"{settings['layers']} of {layers} layers measured on {machine['gpu'] or machine['processor']}, "
        f"{settings['tokens']} tokens, torch {machine['versions']['torch']}, {row['date'][:10]}"
    )
    return shapes, config, getattr(torch, settings["dtype"]).itemsize, compute, origin


def predict(
    shapes: Llama, config: SylvaConfig, width: int, compute: dict[str, float], ranks: Sequence[int] = RANKS
) -> dict[str, dict[str, Any]]:
    """Return, by method: compute, bytes by number of processes, and the least and most milliseconds of a step."""
    results: dict[str, dict[str, Any]] = {}
    for method, variant in COMPUTE.items():
        if variant not in compute:
            continue
        own = compute[variant]
        sent = {count: traffic(method, shapes, config, count, width) for count in ranks}
        steps = {}
        for link, gbit in LINKS.items():
            messages = {count: 1e3 * each.seconds(count, gbit) for count, each in sent.items()}
            steps[link] = {str(count): [max(own, ms), own + ms] for count, ms in messages.items()}
        bytes_sent = {str(count): asdict(each) for count, each in sent.items()}
        results[method] = {"compute_ms": own, "bytes": bytes_sent, "step_ms": steps}
    return results


def cell(bounds: Sequence[float]) -> str:
    """Format the least and the most milliseconds."""
    low, high = (f"{value:,.0f}" for value in bounds)
    return low if low == high else f"{low}–{high}"


def megabytes(row: dict[str, Any], ranks: int = 8) -> str:
    """Format the megabytes that each of `ranks` processes sends in a step; `row` is one method's result."""
    return f"{Traffic(**row['bytes'][str(ranks)]).sent(ranks) / 1e6:,.0f}"


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure or take the compute, print a table for each link, and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="of the model that is measured here (%(default)s)")
    parser.add_argument("--mlp", type=int, default=2752, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each process (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="(%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.98, help="(%(default)s)")
    parser.add_argument("--kept", help="take the compute of this result of benchmarks.step, times the layers")
    parser.add_argument("--model", choices=list(DENSE), help="count a model in bfloat16; needs --step-ms")
    parser.add_argument("--step-ms", type=float, nargs=3, metavar=("FULL", "LORA", "BLOCKS"), help="compute, as given")
    options = parser.parse_args(argv)
    if (options.model is None) != (options.step_ms is None) or (options.model and options.kept):
        parser.error("give --model and --step-ms together, or --kept, or none of them")
    config = SylvaConfig(method="random", block_size=options.block_size, sparsity=options.sparsity)
    if options.model:
        shapes, width, origin = DENSE[options.model], 2, "given, not measured"
        compute = dict(zip(("full", "lora", "sylva"), options.step_ms, strict=True))
    elif options.kept:
        shapes, config, width, compute, origin = from_kept(options.kept, options.layers)
    else:
        heads = options.hidden // 64
        shapes = Llama(options.hidden, options.mlp, options.layers, heads, heads, 64, vocabulary=1024, tied=False)
        width, origin = 4, f"measured here, on the CPU, {options.tokens} tokens"
        compute = measured(shapes, config, options.tokens, options.repeats, options.inner)
    results = predict(shapes, config, width, compute)
    for link, gbit in LINKS.items():
        print_table(
            f"{link} ({gbit:,.0f} Gbit/s, rated): milliseconds of a step; compute is {origin}",
            ["method", "MB sent, of 8", *map(str, RANKS)],
            [
                [name, megabytes(row), *(cell(row["step_ms"][link][str(count)]) for count in RANKS)]
                for name, row in results.items()
            ],
        )
    settings = {**vars(options), "origin": origin, "model_shapes": asdict(shapes), "links_gbit": LINKS}
    settings |= {"block_size": config.block_size, "sparsity": config.sparsity}
    print(f"written to {write_results('scaling', settings, results)}")
    return results


if __name__ == "__main__":
    main()
