"""One run of a grid: training and evaluation of one model by one method."""

import copy
import functools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sylva_compile
from benchmarks.peak import peak_above
from benchmarks.quality.cost import beside_floor
from benchmarks.quality.grid import Run, Settings
from benchmarks.quality.methods import METHODS
from benchmarks.quality.ready import Budgeted, Ready
from benchmarks.quality.tasks import Batch, Data, Sizes, head_of, on
from benchmarks.quality.traces import Scores, block_scores
from benchmarks.quality.training import optimizer_of, train
from sylva_compile.blocks.compile_units import caching_configurations, compile_units
from sylva_compile.blocks.scope import weights_in_scope

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
"""The folder of data sets that commands read unless they are given another."""


class Runner:
    """Does runs, and caches the data, the models before training and the block scores, which runs share."""

    def __init__(self, data: Path, until: float = float("inf"), device: str = "cpu") -> None:
        """Take the folder of the data sets, the monotonic time after which no run begins, and the device."""
        self.folder, self.until, self.device = data, until, torch.device(device)
        self._data: dict[tuple[Any, ...], Data[Any, Any]] = {}
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._scores: dict[tuple[Any, ...], Scores] = {}

    def do(self, run: Run) -> dict[str, Any]:
        """Train and evaluate the model of `run`; return the measurements of its row."""
        started = time.perf_counter()
        settings = run.settings
        # Dynamo compiles one code a few times, for all models of a process together, and then runs it as it is.
        torch.compiler.reset()
        data = self.data(run)
        model = self.model(run)
        batches = self.steps(run)
        floor = copy.deepcopy(model)
        weights = list(weights_in_scope(model, settings.scope).values())
        ready = self.prepare(run, model)
        if settings.compile != "none":
            backend: Any = (
                sylva_compile.backend(ready.masks, inner=settings.compile)  # type: ignore[arg-type]
                if ready.masks is not None
                else settings.compile
            )
            self._compile(ready.model, weights, backend, settings)
            self._compile(floor, weights_in_scope(floor, settings.scope).values(), settings.compile, settings)
        trainable = sum(parameter.numel() for parameter in ready.model.parameters() if parameter.requires_grad)
        optimizer = optimizer_of(ready, run.learning_rate, settings.head_learning_rate)
        trained = train(ready, batches, optimizer, autocast=settings.autocast)
        task = run.about()

        def judged(part: Any) -> dict[str, Any]:
            if math.isfinite(trained.loss):
                return task.evaluate(ready.model, part, 4 * settings.batch)
            # The metrics of a model that diverged mean nothing, and its text generation may not even end.
            further = {"further": dict.fromkeys(task.further, math.nan)} if task.further else {}
            return {"metric": math.nan, "loss": math.nan, **further}

        few = batches[:: -(-len(batches) // settings.cost_batches)]
        warm_up = 1 if settings.compile == "none" else len(few)
        cost = beside_floor(floor, ready, optimizer, few, warm_up, autocast=settings.autocast)
        return {
            **task.provenance(self.folder, settings.model),
            "validation": judged(data.validation),
            "test": judged(data.test),
            "trainable": trainable,
            "head": sum(parameter.numel() for parameter in head_of(ready.model)),
            "steps": len(batches),
            **asdict(trained),
            "checkpoint_bytes": ready.checkpoint(),
            "trace_seconds": ready.trace_seconds,
            "trace_bytes": ready.trace_bytes,
            "nonzero": sum(int(weight.count_nonzero()) for weight in weights) / sum(w.numel() for w in weights),
            "beside_floor": cost._asdict(),
            "seconds": time.perf_counter() - started,
        }

    def prepare(self, run: Run, model: nn.Module) -> Ready:
        """Prepare `model` for training by the method of `run`."""
        settings = run.settings
        budget = Budgeted(settings.scope, run.options.get("sparsity", settings.sparsity), settings.block_size)
        torch.manual_seed(run.seed)
        kind = METHODS[run.options["kind"]]
        return kind.prepare(model, run.options, budget, lambda options: self.scores(run, options), run.seed)

    def steps(self, run: Run) -> list[Batch]:
        """Return the batch of every step of a run."""
        return [batch for epoch in range(run.settings.epochs) for batch in self.batches(run, 1000 * run.seed + epoch)]

    def _compile(self, model: nn.Module, weights: Iterable[Tensor], backend: Any, settings: Settings) -> None:
        """Compile a model in place, or those of its layers that hold `weights`."""
        units = compile_units(model, weights) if settings.layerwise else None
        if units is not None:
            for config in caching_configurations(model):
                config.use_cache = False
        for unit in units or [model]:
            unit.compile(backend=backend)

    def data(self, run: Run) -> Data[Any, Any]:
        """Return the examples of the run's task."""
        s = run.settings
        sizes = Sizes(s.train, s.validation, s.extra_test, s.length)
        key = (run.task, s.model, sizes)
        if key not in self._data:
            self._data[key] = run.about().load(self.folder, s.model, sizes)
        return self._data[key]

    def batches(self, run: Run, seed: int) -> list[Batch]:
        """Return the batches of one pass over the training examples of the run's task, shuffled by `seed`."""
        batches = self.data(run).train.batches(run.settings.batch, seed=seed)
        return [on(self.device, batch) for batch in batches]

    def model(self, run: Run) -> nn.Module:
        """Return a copy of the model that every method starts from: pre-trained; its head is new or trained alone."""
        s = run.settings
        # The numbers of held-out examples are part of the key: they determine which examples are trained on.
        data = (s.train, s.validation, s.extra_test, s.batch, s.length)
        head = (*data, s.head_steps, s.head_learning_rate) if s.head_steps else ()
        key = (run.task, s.model, run.seed, *head)
        if key not in self._models:
            # One cached model is enough: runs come sorted by seed.
            self._models.clear()
            model: nn.Module = run.about().make_model(self.folder, s.model, run.seed).to(self.device)
            if s.head_steps:
                ready = METHODS["head"].prepare(model, {}, Budgeted(s.scope, s.sparsity, s.block_size), _untraced, 0)
                epochs = -(-s.head_steps * s.batch // len(self.data(run).train))
                batches = [
                    batch for epoch in range(epochs) for batch in self.batches(run, 1000 * run.seed + 500 + epoch)
                ]
                optimizer = optimizer_of(ready, s.head_learning_rate, s.head_learning_rate)
                train(ready, batches[: s.head_steps], optimizer)
                model.requires_grad_(True)
            self._models[key] = model
        return copy.deepcopy(self._models[key])

    def scores(self, run: Run, options: Mapping[str, Any]) -> Scores:
        """Return the block scores of a run with blocks; runs that differ in sparsity or learning rate share them."""
        s = run.settings
        config = s.trace_config(options)
        data = (run.task, s.model, s.train, s.validation, s.extra_test, s.batch, s.length)
        key = (*data, s.head_steps, s.head_learning_rate, run.seed, config)
        if key not in self._scores:
            model = self.model(run)
            trace = functools.partial(block_scores, model, self.batches(run, 1000 * run.seed + 999), seed=run.seed)
            scores = trace(config)
            # Two batches show the peak; profiling all of them would take more memory than the trace.
            few = replace(config, num_samples=min(s.samples, 2 * s.batch))
            _, peak = peak_above(functools.partial(trace, few), next(model.parameters()).device)
            self._scores[key] = replace(scores, peak_bytes=peak)
        return self._scores[key]


def _untraced(options: Mapping[str, Any]) -> Scores:
    raise AssertionError("this method looks at no block scores")
