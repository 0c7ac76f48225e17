"""What a trace costs beside the forward and backward passes that it watches: time and peak memory.

    python -m benchmarks.trace_cost                 prints the tables and writes benchmarks/results/*.json

Time: seconds a batch, in one process, the methods taking turns over the same batches; the floor is the plain forward
and backward pass, gradients of all weights included. A trace compiles the model before its first batch; that is shown
on its own. Memory: each method in a process of its own, one after the other, over two sequences; its peak
above that of the plain passes.

Where kronfluence is installed, its fit of A and G (it keeps no mean gradient) stands beside ours. It asks for
torchvision, which it does not need here and which must be of torch's own version:

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
    "sylva, joint": {"method": "sylva", "score": "greedy"},
    "sylva, gain": {"method": "sylva", "score": "gain"},
    "sylva, paper": {"method": "sylva", "score": "paper"},
    "kfac": {"method": "kfac", "score": "paper"},
}
FLOOR = "forward and backward"
Batch = dict[str, Tensor]


class Times(NamedTuple):
    """Seconds of each batch but the first and the last, of what came before the second batch, and of the scores."""

    batches: list[float]
    before: float
    after: float


def _now() -> float:
    """Seconds, once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stamped:
    """Batches that note when each is asked for."""

    def __init__(self, batches: list[Batch]) -> None:
        """Of `batches`, four or more."""
        self.batches, self.stamps = batches, [_now()]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.stamps.append(_now())
            yield batch

    def times(self) -> Times:
        """After a run over all of them. Nobody asks when the last batch is done: it is taken for an ordinary one."""
        start, _, *stamps = self.stamps
        seconds = [later - earlier for earlier, later in itertools.pairwise(stamps)]
        return Times(seconds, stamps[0] - start, _now() - stamps[-1] - statistics.median(seconds))


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """What a trace in the scope "all-linear" watches."""
    return [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]


def run_floor(model: nn.Module, loader: Stamped) -> None:
    """Forward and backward, eagerly."""
    for batch in loader:
        gradients = torch.autograd.grad(model(**batch).loss, weights_of(model))
        assert all(bool(gradient.any()) for gradient in gradients)


def run_ours(method: str) -> Callable[[nn.Module, Stamped], None]:
    """`trace_and_mask`."""

    def run(model: nn.Module, loader: Stamped) -> None:
        samples = sum(len(batch["labels"]) for batch in loader.batches)
        masks = sylva_compile.trace_and_mask(model, loader, num_samples=samples, progress=False, **OURS[method])
        assert all(mask.nnz for mask in masks.values())

    return run


def run_kronfluence(model: nn.Module, loader: Stamped) -> None:
    """Covariance matrices of activations and of gradients, as kronfluence gathers them."""
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
    """A randomly initialised Llama and random batches."""
    torch.manual_seed(0)
    model = llama(hidden, hidden * 11 // 4, layers).eval().to(options.device, getattr(torch, options.dtype))
    shape = (options.batches, options.batch, options.length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=options.device)
    return model, [{"input_ids": each, "labels": each} for each in ids]


def measure_time(options: argparse.Namespace, hidden: int) -> dict[str, dict[str, Any]]:
    """Medians over rounds and batches, and their ratio to the floor."""
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    before: dict[str, list[float]] = {name: [] for name in RUNS}
    after: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(options.rounds):
        for name, run in RUNS.items():
            # kronfluence wraps the modules of the model that it is given.
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
    """Peak resident bytes of this process after a run; to be called once a process."""
    torch.set_num_threads(options.threads)
    model, batches = made(options, options.memory_layers, options.memory_hidden)
    # What factors and gradients take does not depend on the tokens.
    RUNS[name](model, Stamped([{key: value[:1] for key, value in batch.items()} for batch in batches[:2]]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Peak bytes of each method, and those above the floor's; for ours also what `estimate` says."""
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
    """Measure, print, write."""
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
