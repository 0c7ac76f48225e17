"""Count the bytes that fine-tuning a model takes: arithmetic from shapes, not a measurement.

    python -m benchmarks.memory_arithmetic                 prints the tables of docs/memory.md

What a step allocates for activations depends on batch and sequences and is not counted. Factors of a trace are counted
by the library's own `estimate`, from shapes alone.
"""

from dataclasses import dataclass

import torch

from benchmarks.command import parser_of
from benchmarks.model_shapes import MODELS, Llama
from benchmarks.report import markdown
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.kernels.blocks import grid_shape
from sylva_compile.tracing.memory import TraceEstimate, estimate_bytes

GIB = 1 << 30
SPARSITIES = (0.98, 0.95, 0.8)
CARDS = (24, 48, 80)
"""GiB of memory of the cards in the table."""
STATES = {"AdamW": 2, "Muon": 1, "Muon without momentum": 0}
"""Moments that an optimizer keeps of each trained value, float32 each."""


@dataclass(frozen=True)
class Bytes:
    """The bytes of one fine-tuning, without activations.

    Attributes:
        weights: all of the model, bfloat16.
        blocks: float32.
        gradients: of the blocks, float32.
        states: of the optimizer, float32.
        originals: on the host: values from before training where blocks are, bfloat16.
        originals_moving: the same once blocks have been everywhere.
    """

    weights: int
    blocks: int
    gradients: int
    states: int
    originals: int
    originals_moving: int

    @property
    def device(self) -> int:
        """The bytes on the device."""
        return self.weights + self.blocks + self.gradients + self.states


def trainable(model: Llama, config: SylvaConfig) -> int:
    """Return the number of values that are trained; blocks at a weight's edges count whole."""
    b = config.block_size
    grids = (grid_shape(shape, b) for _, shape in model.weights())
    return sum(config.blocks(rows * columns) * b * b for rows, columns in grids)


def count(model: Llama, config: SylvaConfig, moments: int) -> Bytes:
    """Count the bytes of fine-tuning `model`; `moments` as in `STATES`."""
    trained = trainable(model, config)
    return Bytes(
        weights=2 * model.parameters(),
        blocks=4 * trained,
        gradients=4 * trained,
        states=4 * moments * trained,
        originals=2 * trained,
        originals_moving=2 * model.masked(),
    )


def trace(model: Llama, config: SylvaConfig) -> TraceEstimate:
    """Return what `sylva_compile.estimate` says of a model of these shapes in bfloat16."""
    kind = torch.bfloat16, torch.device("cuda")
    specs = {name: WeightSpec(name, shape, *kind, experts=model.experts_in(name)) for name, shape in model.weights()}
    return estimate_bytes(specs, config)


def training_table() -> str:
    """Return the table of bytes of a training, by model and share of the blocks."""
    rows = []
    for name, model in MODELS.items():
        for sparsity in SPARSITIES:
            config = SylvaConfig(sparsity=sparsity)
            found = count(model, config, STATES["AdamW"])
            states = [gib(4 * moments * trainable(model, config)) for moments in STATES.values()]
            parts = (found.weights, found.blocks, found.gradients)
            rows.append(
                [
                    name,
                    f"{1 - sparsity:.0%}",
                    *map(gib, parts),
                    *states,
                    gib(found.originals),
                    gib(found.originals_moving),
                ]
            )
    columns = ["model", "blocks", "weights", "blocks, float32", "gradients", *STATES, "host", "host, moving"]
    return markdown(columns, rows)


def card_table() -> str:
    """Return the table of what is left for activations on cards of some sizes."""
    rows = []
    for name, model in MODELS.items():
        for sparsity in SPARSITIES:
            row = [name, f"{1 - sparsity:.0%}"]
            for optimizer in ("AdamW", "Muon"):
                total = count(model, SylvaConfig(sparsity=sparsity), STATES[optimizer]).device
                row += [gib(total), *(gib(card * GIB - total) if card * GIB > total else "–" for card in CARDS)]
            rows.append(row)
    left = [f"left of {card}" for card in CARDS]
    return markdown(["model", "blocks", "AdamW, in all", *left, "Muon, in all", *left], rows)


def nf4_bytes(values: int, *, double: bool) -> int:
    """Return the bytes of `values` in NF4 of bitsandbytes: half a byte each, and a scale for each block of 64.

    A scale is float32; quantised again (`double`), it is a byte, and each 256 of them have a float32 scale.
    """
    scales = values // 64
    return values // 2 + (scales + 4 * (scales // 256) if double else 4 * scales)


def quantised_table() -> str:
    """Return the table of bytes in an NF4 base with double quantisation, by model and share of the blocks.

    The experts of a mixture are not packed.
    """
    rows = []
    for name, model in MODELS.items():
        for sparsity in SPARSITIES:
            config = SylvaConfig(sparsity=sparsity)
            trained, masked, linear = trainable(model, config), model.masked(), model.linear()
            packed = nf4_bytes(linear, double=True) + 2 * (model.parameters() - linear)
            total = packed + 4 * trained * (2 + STATES["AdamW"])
            left = (gib(card * GIB - total) if card * GIB > total else "–" for card in CARDS)
            rows.append([name, f"{1 - sparsity:.0%}", gib(packed), gib(total), *left, gib(2 * masked)])
    left_of = [f"left of {card}" for card in CARDS]
    return markdown(["model", "blocks", "base, NF4", "AdamW, in all", *left_of, "moving, at most"], rows)


def trace_table() -> str:
    """Return the table of bytes of a trace, by model and score."""
    rows = []
    for name, model in MODELS.items():
        for score in ("greedy", "gain", "paper"):
            held = trace(model, SylvaConfig(score=score, gradient_device="cpu"))
            device = torch.device("cuda")
            host = sum(weight.memory.gradient for weight in held.weights.values())
            rows.append([name, score, gib(held.at_least()[device]), gib(held.at_most()[device]), gib(host)])
    return markdown(["model", "score", "device, at least", "device, at most", "mean gradients"], rows)


def gib(count: int) -> str:
    """Format bytes in GiB."""
    return f"{count / GIB:.2f}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser_of(__spec__, __doc__).parse_args(argv)
    for table in (training_table(), card_table(), quantised_table(), trace_table()):
        print(f"{table}\n")


if __name__ == "__main__":
    main()
