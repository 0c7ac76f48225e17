"""Compare training with blocks that move, and with layers that are drawn, with blocks that stay and the frozen floor.

    python -m benchmarks.moving                            prints the table and writes benchmarks/results/*.json

A period is `--every` steps: forward and backward pass, Muon's step, and one move. Variants live in one process and take
turns, period by period; the ratios are ratios of medians. "frozen" is the forward and backward pass alone, as many
times. "layers" train the blocks of a quarter of the layers, drawn anew at every step, in a model compiled layer by
layer and not whole, beside "all layers" of such a model. Losses agree and gradients are non-zero before anything is
timed.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.step import peak_bytes, warm_compiler
from benchmarks.variants import Variant, assert_losses_agree, llama, saved_bytes
from sylva_compile.blocks.embed import block_states
from sylva_compile.optim import Muon
from sylva_compile.schedules import LayerSchedule, MovingBlocks

VARIANTS = (
    "frozen",
    "fixed",
    "random",
    "sketch",
    "gradient",
    "fixed, columns",
    "random, columns",
    "all layers",
    "layers",
)
TWINS = {"random, columns": "fixed, columns", "layers": "all layers", "all layers": "all layers"}
"""The variant whose blocks stay, where that is not "fixed"."""


@dataclass
class Trainer:
    """A variant, and what follows each of its backward passes."""

    variant: Variant
    after: Callable[[], None]
    schedule: Any = None

    def period(self, steps: int) -> float:
        """Train for `steps` steps and return the milliseconds of one."""
        _wait()
        started = time.perf_counter()
        for _ in range(steps):
            self.variant.loss().backward()
            self.after()
        _wait()
        return (time.perf_counter() - started) * 1e3 / steps


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make(name: str, base: LlamaForCausalLM, ids: torch.Tensor, options: dict[str, Any]) -> Trainer:
    """Make the variant `name` of `base`, compiled, on the batch `ids [B, S]`."""
    model = copy.deepcopy(base).requires_grad_(False)
    inner = options["inner"]
    inputs = base.get_input_embeddings()(ids).detach().requires_grad_(name == "frozen")
    if name == "frozen":
        run: Any = torch.compile(model, backend=inner)
        return Trainer(Variant(name, model, _loss(run, inputs, ids), [], inputs), lambda: setattr(inputs, "grad", None))
    chosen = {"sparsity": options["sparsity"], "block_size": options["block_size"]}
    masks = sylva_compile.trace_and_mask(model, method="random", **chosen)
    budget = options["columns"] if name.endswith("columns") else None
    schedule: Any = None
    if name != "all layers" and name != "layers":
        every = 10**9 if name.startswith("fixed") else options["every"]
        choose: Any = name if name in ("sketch", "gradient") else "random"
        schedule = MovingBlocks(masks, every=every, choose=choose, column_budget=budget)
    backend = sylva_compile.backend(masks, inner=inner, on_miss="error")
    if schedule is None:
        for layer in model.model.layers:
            layer.compile(backend=backend)
        run = model
    else:
        run = torch.compile(model, backend=backend)
    optimizer = Muon(masks.parameters(), lr=1e-4)
    if name == "layers":
        # The first step has compiled everything and made the states of all layers.
        schedule = LayerSchedule(masks, "random", fraction=0.25)

    def after() -> None:
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()

    trained = [blocks for blocks in masks.parameters() if blocks.requires_grad]
    return Trainer(Variant(name, model, _loss(run, inputs, ids), trained, inputs), after, schedule)


def _loss(run: Any, inputs: torch.Tensor, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    def loss() -> torch.Tensor:
        value: torch.Tensor = run(inputs_embeds=inputs, labels=ids).loss
        return value

    return loss


def measure(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by variant: the time of a step, its ratio to the floor and to its fixed twin, and bytes."""
    # Every variant is one more model that runs the same code.
    torch._dynamo.config.recompile_limit = 64
    warm_compiler(options["device"], options["inner"])
    torch.manual_seed(0)
    base = llama(options["hidden"], options["mlp"], options["layers"]).to(options["device"])
    count = max(1, options["tokens"] // options["length"])
    ids = torch.randint(0, base.config.vocab_size, (count, options["length"]), device=options["device"])
    ready: dict[str, Trainer] = {}
    results: dict[str, dict[str, Any]] = {}
    losses = []
    for name in options["names"]:
        trainer = ready[name] = make(name, base, ids, options)
        if name in ("sketch", "gradient"):
            for state in block_states(trainer.variant.model).values():
                state.layout.listen(name == "sketch")
        saved, loss = saved_bytes(trainer.variant)
        losses.append(loss)
        results[name] = {"saved_bytes": saved, "peak_bytes": peak_bytes(trainer.variant)}
        trainer.variant.model.zero_grad()
    assert_losses_agree(losses, base.dtype)
    times: dict[str, list[float]] = {name: [] for name in ready}
    graphs: dict[str, int] = {}
    gc.disable()
    try:
        for turn in range(options["repeats"] + 2):
            order = list(ready)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                before = _graphs()
                elapsed = ready[name].period(options["every"])
                if turn >= 2:
                    times[name].append(elapsed)
                    graphs[name] = graphs.get(name, 0) + _graphs() - before
    finally:
        gc.enable()
    for name, row in results.items():
        twin = {"random, columns": "fixed, columns", "layers": "all layers", "all layers": "all layers"}.get(
            name, "fixed"
        )
        middle = statistics.median(times[name])
        row["step_ms"] = dict(zip(("q25", "median", "q75"), statistics.quantiles(times[name], n=4), strict=True))
        row["of_floor"] = middle / statistics.median(times["frozen"])
        row["of_twin"] = middle / statistics.median(times[twin]) if twin in times else None
        row["graphs_while_timed"] = graphs[name]
    return results


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


COLUMNS = ["variant", "ms", "of the floor", "of the fixed twin", "saved, MiB", "peak, MiB", "compiled while timed"]


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the printed table."""
    return [
        [
            name,
            f"{row['step_ms']['median']:.1f}",
            f"{row['of_floor']:.3f}",
            "-" if row["of_twin"] is None or name == "frozen" else f"{row['of_twin']:.3f}",
            f"{row['saved_bytes'] / 2**20:.1f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            str(row["graphs_while_timed"]),
        ]
        for name, row in results.items()
    ]


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure, print the table and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="%(default)s")
    parser.add_argument("--mlp", type=int, default=2752, help="%(default)s")
    parser.add_argument("--layers", type=int, default=4, help="%(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="%(default)s")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--block-size", type=int, default=64, help="%(default)s")
    parser.add_argument("--sparsity", type=float, default=0.95, help="%(default)s")
    parser.add_argument("--every", type=int, default=8, help="steps between moves (%(default)s)")
    parser.add_argument("--columns", type=float, default=0.25, help="column budget of the last moves (%(default)s)")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="periods (%(default)s)")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor", help="%(default)s")
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants (all)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "no_write"}
    with fresh_cache():
        results = measure(settings)
    print_table("A step, moves included", COLUMNS, table(results))
    if not options.no_write:
        print(f"written to {write_results('moving', settings, results)}")
    return results


if __name__ == "__main__":
    main()
