"""The cost of a trace beside that of plain forward and backward passes: time and peak memory.

    python -m benchmarks.trace_cost                 prints the tables and writes benchmarks/results/*.json

Time: seconds a batch, in one process; the methods take turns over the same batches. The floor is the plain forward and
backward pass, with the gradients of all weights. A trace compiles the model before its first batch; that time is shown
separately. Memory: each method runs in its own process, one after the other, over two sequences; the figure is its peak
above that of the plain passes.

Where kronfluence is installed, its fit of A and G (it keeps no mean gradient) is measured too. It depends on
torchvision, which is not needed here and would have to match the version of torch, so install it without dependencies:

    pip install --no-deps kronfluence einops opt_einsum einconv
"""

import argparse
import gc
import importlib.util
import itertools
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.command import parser_of
from benchmarks.report import print_table, write_results
from benchmarks.variants import llama

OURS = {
    "sylva, greedy": {"method": "sylva", "score": "greedy"},
    "sylva, gain": {"method": "sylva", "score": "gain"},
    "sylva, paper": {"method": "sylva", "score": "paper"},
    "kfac": {"method": "kfac", "score": "paper"},
}
FLOOR = "forward and backward"
Batch = dict[str, Tensor]


class Times(NamedTuple):
    """The times of a run, in seconds.

    Attributes:
        batches: the time of each batch but the first and the last.
        before: the time until the second batch, compilation included.
        after: the time after the last batch, in which the scores are computed.
    """

    batches: list[float]
    before: float
    after: float


def _now() -> float:
    """Return the time in seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stamped:
    """A loader that notes when each batch is asked for."""

    def __init__(self, batches: list[Batch]) -> None:
        """Take `batches`, four or more."""
        self.batches, self.stamps = batches, [_now()]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.stamps.append(_now())
            yield batch

    def times(self) -> Times:
        """Return the times of a run over all batches. The last batch is not timed: it counts as a median one."""
        start, _, *stamps = self.stamps
        seconds = [later - earlier for earlier, later in itertools.pairwise(stamps)]
        return Times(seconds, stamps[0] - start, _now() - stamps[-1] - statistics.median(seconds))


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that a trace with the scope "all-linear" observes."""
    return [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def run_floor(model: nn.Module, loader: Stamped) -> None:
    """Run forward and backward passes, eagerly."""
    for batch in loader:
        gradients = torch.autograd.grad(model(**batch).loss, weights_of(model))
        assert all(bool(gradient.any()) for gradient in gradients)


def run_ours(method: str) -> Callable[[nn.Module, Stamped], None]:
    """Return a function that runs `trace_and_mask` with the options `OURS[method]`."""

    def run(model: nn.Module, loader: Stamped) -> None:
        samples = sum(len(batch["labels"]) for batch in loader.batches)
        masks = sylva_compile.trace_and_mask(model, loader, num_samples=samples, progress=False, **OURS[method])
        assert all(mask.nnz for mask in masks.values())

    return run


def run_kronfluence(model: nn.Module, loader: Stamped) -> None:
    """Compute the covariance matrices of activations and of gradients with kronfluence."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.module.utils import get_tracked_module_names
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class CausalLoss(Task):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            return model(**batch).loss

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            raise NotImplementedError

        def get_influence_tracked_modules(self) -> list[str]:
            return [
                name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
            ]

    task = CausalLoss()
    prepared = prepare_model(model, task)
    arguments = FactorArguments(use_empirical_fisher=True)
    names = get_tracked_module_names(prepared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        fit_covariance_matrices_with_loader(
            prepared, State(cpu=True), task, loader, arguments, names, disable_tqdm=True
        )


RUNS: dict[str, Callable[[nn.Module, Stamped], None]] = {
    FLOOR: run_floor,
    **{name: run_ours(name) for name in OURS},
}
if importlib.util.find_spec("kronfluence") is not None:
    RUNS["kronfluence"] = run_kronfluence


def made(options: argparse.Namespace, layers: int, hidden: int) -> tuple[nn.Module, list[Batch]]:
    """Make a randomly initialised Llama and random batches."""
    torch.manual_seed(0)
    model = llama(hidden, hidden * 11 // 4, layers).eval().to(options.device, getattr(torch, options.dtype))
    shape = (options.batches, options.batch, options.length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=options.device)
    return model, [{"input_ids": each, "labels": each} for each in ids]


def measure_time(options: argparse.Namespace, hidden: int) -> dict[str, dict[str, Any]]:
    """Return medians over rounds and batches, and their ratio to the floor."""
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    before: dict[str, list[float]] = {name: [] for name in RUNS}
    after: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(options.rounds):
        for name, run in RUNS.items():
            # Each run gets a new model, since kronfluence wraps the modules of the model that it is given.
            model, batches = made(options, options.layers, hidden)
            loader = Stamped(batches)
            run(model, loader)
            times = loader.times()
            seconds[name] += times.batches
            before[name].append(times.before)
            after[name].append(times.after)
            gc.collect()
    floor = statistics.median(seconds[FLOOR])
    return {
        name: {
            "seconds_a_batch": statistics.median(found),
            "quartiles": statistics.quantiles(found, n=4, method="inclusive"),
            "of_floor": statistics.median(found) / floor,
            "until_second_batch": statistics.median(before[name]),
            "after_last_batch": statistics.median(after[name]),
        }
        for name, found in seconds.items()
    }


def peak_of(name: str, options: argparse.Namespace) -> int:
    """Run a method and return the peak resident bytes of this process; call it once a process."""
    torch.set_num_threads(options.threads)
    model, batches = made(options, options.memory_layers, options.memory_hidden)
    # The memory of factors and gradients does not depend on the number of tokens.
    RUNS[name](model, Stamped([{key: value[:1] for key, value in batch.items()} for batch in batches[:2]]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Return the peak bytes of each method and those above the floor's; for our methods also the `estimate`."""
    peaks = {}
    for name in RUNS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peaks[name] = process.submit(peak_of, name, options).result()
    model, _ = made(options, options.memory_layers, options.memory_hidden)
    estimates = {name: sum(sylva_compile.estimate(model, **choice).at_most().values()) for name, choice in OURS.items()}
    return {
        name: {"peak": peak, "above_floor": peak - peaks[FLOOR], "estimate": estimates.get(name, 0)}
        for name, peak in peaks.items()
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables and write the results."""
    parser = parser_of(__spec__, __doc__)
    parser.add_argument("--hidden", type=int, nargs="*", default=[768, 1024], help="for the time (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="for the time (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--batches", type=int, default=5, help="a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--memory-hidden", type=int, default=2048, help="for the memory; 0: no memory (%(default)s)")
    parser.add_argument("--memory-layers", type=int, default=8, help="for the memory (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cuda: leave the memory out (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="%(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="%(default)s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"time": {}, "memory": {}}
    for hidden in options.hidden:
        found = results["time"][str(hidden)] = measure_time(options, hidden)
        rows = [
            [
                name,
                f"{1000 * row['seconds_a_batch']:.0f}",
                f"{row['of_floor']:.2f}",
                f"{row['until_second_batch']:.1f}",
                f"{max(row['after_last_batch'], 0):.1f}",
            ]
            for name, row in found.items()
        ]
        tokens = options.batch * options.length
        title = f"Tracing time, hidden size {hidden}, {options.layers} layers, {tokens} tokens a batch"
        print_table(title, ["method", "ms a batch", "of the floor", "s, first batch", "s, scores"], rows)
    if options.memory_hidden:
        results["memory"] = measure_memory(options)
        rows = [
            [name, *(f"{row[key] / 2**20:.0f}" if row[key] or key != "estimate" else "" for key in row)]
            for name, row in results["memory"].items()
        ]
        title = f"Peak memory, hidden size {options.memory_hidden}, {options.memory_layers} layers"
        print_table(title, ["method", "MiB", "above the floor", "estimate"], rows)
    if not options.no_write:
        settings = {key: value for key, value in vars(options).items() if key != "no_write"}
        print(f"written to {write_results('trace_cost', settings, results)}")
    return results


if __name__ == "__main__":
    main()
