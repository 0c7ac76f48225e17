"""Estimate, before a trace runs, the memory that it will hold beside the model."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.distributed import ProcessGroup

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.base import EstimatorMemory
from sylva_compile.curvature.estimators import ESTIMATORS, factor_of, gradient_device, waiting_bytes
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import TraceError

log = logging.getLogger(__name__)

_META = torch.device("meta")
_CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class WeightEstimate:
    """Bytes that a trace holds for one weight.

    Attributes:
        memory: of its estimator: A and G on `device`, the mean gradient on `gradient_device`, and the working memory of
            scoring on `device`, one weight after the other. Weights that read the same inputs share A, which shows in
            the first batch; here each weight counts its own.
        waiting: the largest size of the queue of updates on `device`, which all weights on it share.
        device: the weight's device.
        gradient_device: the device that keeps its mean gradient.
    """

    memory: EstimatorMemory
    waiting: int
    device: torch.device
    gradient_device: torch.device


@dataclass(frozen=True)
class TraceEstimate:
    """Bytes that a trace holds beside the model, its activations and its gradients; prints as a table.

    Attributes:
        weights: by name.
        originals: the bytes on the CPU, at most, of the values from before training, if blocks move later.
        packed: the bytes of the quantised weights, for comparison.
    """

    weights: Mapping[str, WeightEstimate]
    originals: int = 0
    packed: int = 0

    def at_most(self) -> dict[torch.device, int]:
        """Return the bytes on each device if no two weights share A and the queue of updates is full."""
        return self._held(most=True)

    def at_least(self) -> dict[torch.device, int]:
        """Return the bytes on each device without any A, and with an empty queue of updates."""
        return self._held(most=False)

    def _held(self, *, most: bool) -> dict[torch.device, int]:
        held: Counter[torch.device] = Counter()
        # The queue is empty when scores are computed.
        working: dict[torch.device, int] = {}
        for weight in self.weights.values():
            held[weight.device] += weight.memory.output_factor + (weight.memory.input_factor if most else 0)
            held[weight.gradient_device] += weight.memory.gradient
            waiting = weight.waiting if most else 0
            working[weight.device] = max(working.get(weight.device, 0), weight.memory.scoring, waiting)
        held.update(working)
        return dict(held)

    def __str__(self) -> str:
        columns = ("input_factor", "output_factor", "gradient")
        lines = [f"{'A':>10} {'G':>10} {'gradient':>10}  weight"]
        for name, weight in self.weights.items():
            lines.append(" ".join(f"{_size(getattr(weight.memory, column)):>10}" for column in columns) + f"  {name}")
        sums = [sum(getattr(weight.memory, column) for weight in self.weights.values()) for column in columns]
        lines.append(" ".join(f"{_size(count):>10}" for count in sums) + "  in all, where no two share their A")
        for device, most in self.at_most().items():
            lines.append(f"{device}: {_size(self.at_least()[device])} to {_size(most)}, working memory included.")
        if self.packed:
            gradients = sum(weight.memory.gradient for weight in self.weights.values())
            lines.append(
                f"The quantised weights take {_size(self.packed)}, and their mean gradients {_size(gradients)}: keep "
                "these on the CPU (gradient_device='cpu'), or trace fewer weights at a time (scope=...)."
            )
        if self.originals:
            lines.append(f"If blocks move while training: up to {_size(self.originals)} on the cpu, the base's values.")
        return "\n".join(lines)


def estimate_bytes(
    specs: Mapping[str, WeightSpec], config: SylvaConfig, *, split_over: ProcessGroup | None = None
) -> TraceEstimate:
    """Estimate the bytes that the estimators of the weights `specs` will hold on this process.

    Args:
        specs: the weights by name.
        config: the method and its settings.
        split_over: processes of which each keeps some rows of the mean gradients; None: this one keeps all.
    """
    found = {}
    for name, spec in specs.items():
        # On the meta device an estimator has sizes and no memory.
        inputs = InputFactors(factor_of(config))
        there = dataclasses.replace(spec, device=_META)
        estimator = ESTIMATORS[config.method](there, config, inputs, _META, split_over)
        found[name] = WeightEstimate(
            memory=estimator.memory(),
            waiting=waiting_bytes(config, spec.device),
            device=spec.device,
            gradient_device=gradient_device(config) or spec.device,
        )
    dense = (spec for spec in specs.values() if spec.packed is None)
    originals = sum(spec.shape[0] * spec.shape[1] * spec.dtype.itemsize for spec in dense)
    return TraceEstimate(found, originals, sum(spec.packed or 0 for spec in specs.values()))


def check_fits(estimate: TraceEstimate) -> None:
    """Raise TraceError if a device has too little memory free for sure; warn if it may have too little."""
    least = estimate.at_least()
    for device, most in estimate.at_most().items():
        free = free_bytes(device)
        text = f"{_size(least[device])} to {_size(most)} on {device} beside the model, and {_size(free)} are free"
        remedy = "use score='gain', a narrower scope, or gradient_device='cpu'."
        if least[device] > free:
            raise TraceError(f"Tracing would hold {text}; {remedy}")
        if most > free:
            log.warning("Tracing may not fit: it will hold %s. If it fails, %s", text, remedy)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still take on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([int(psutil.virtual_memory().available), *_container_limit()])


def _container_limit() -> list[int]:
    """Return the rest of the memory limit of this process's control group, if it has one."""
    try:
        limit, used = (int((_CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # The kernel drops cached files before a process runs out of memory.
        cached = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
    except (OSError, ValueError, KeyError):
        return []
    return [limit - used + int(cached)]


def _size(count: int) -> str:
    for unit, step in (("GiB", 30), ("MiB", 20)):
        if abs(count) >= 1 << step:
            return f"{count / (1 << step):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
