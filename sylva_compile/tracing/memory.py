"""What a trace will hold in memory beside the model, told before it runs."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from sylva_compile.curvature.estimators import EstimatorChoice
from sylva_compile.errors import TraceError
from sylva_compile.kernels.blocks import block_dtype

log = logging.getLogger(__name__)

_META = torch.device("meta")
_SCORING_COPIES = 6
_CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class WeightEstimate:
    """Bytes that a trace holds for one weight.

    Attributes:
        input_factor: A, on the weight's device. Weights that read the same inputs share it, which shows in the first
            batch; here each counts its own.
        output_factor: G, on the weight's device.
        gradient: the mean gradient, on `gradient_device`.
        scoring: working memory of its scores at the end, one weight after the other, on the weight's device.
        waiting: what updates of its device's factors, of other weights too, take as they wait for each other, at most.
        device: where the weight lives.
        gradient_device: where its mean gradient is kept.
    """

    input_factor: int
    output_factor: int
    gradient: int
    scoring: int
    waiting: int
    device: torch.device
    gradient_device: torch.device


@dataclass(frozen=True)
class TraceEstimate:
    """Bytes that a trace holds beside the model, its activations and its gradients; prints as a table.

    Attributes:
        weights: by name.
    """

    weights: Mapping[str, WeightEstimate]

    def at_most(self) -> dict[torch.device, int]:
        """What each device holds if no two weights read the same inputs and as much waits as may."""
        return self._held(most=True)

    def at_least(self) -> dict[torch.device, int]:
        """What each device holds without any input factor, and if nothing waits."""
        return self._held(most=False)

    def _held(self, *, most: bool) -> dict[torch.device, int]:
        held: Counter[torch.device] = Counter()
        # Nothing waits any more when scores are computed.
        working: dict[torch.device, int] = {}
        for weight in self.weights.values():
            held[weight.device] += weight.output_factor + (weight.input_factor if most else 0)
            held[weight.gradient_device] += weight.gradient
            waiting = weight.waiting if most else 0
            working[weight.device] = max(working.get(weight.device, 0), weight.scoring, waiting)
        held.update(working)
        return dict(held)

    def __str__(self) -> str:
        columns = ("input_factor", "output_factor", "gradient")
        lines = [f"{'A':>10} {'G':>10} {'gradient':>10}  weight"]
        for name, weight in self.weights.items():
            lines.append(" ".join(f"{_size(getattr(weight, column)):>10}" for column in columns) + f"  {name}")
        sums = [sum(getattr(weight, column) for weight in self.weights.values()) for column in columns]
        lines.append(" ".join(f"{_size(count):>10}" for count in sums) + "  in all, where no two share their A")
        for device, most in self.at_most().items():
            lines.append(f"{device}: {_size(self.at_least()[device])} to {_size(most)}, working memory included.")
        return "\n".join(lines)


def estimate_bytes(
    weights: Mapping[str, nn.Parameter], axes: Mapping[str, int], choice: EstimatorChoice
) -> TraceEstimate:
    """What the estimators of `weights` will hold; `axes` as for `Estimators`."""
    found = {}
    new_factor = choice.new_factor()
    for name, weight in weights.items():
        dtype = block_dtype(weight.dtype)
        outputs, inputs = weight.shape if axes[name] == 1 else reversed(weight.shape)
        a, g = (0 if choice.method == "fisher" else new_factor(size, dtype, _META).nbytes for size in (inputs, outputs))
        found[name] = WeightEstimate(
            input_factor=a,
            output_factor=g,
            gradient=weight.numel() * dtype.itemsize,
            # Scores are computed in float64, from copies of the gradient and of the factors.
            scoring=8 * _SCORING_COPIES * weight.numel() + 4 * (a + g),
            waiting=choice.group_bytes(weight.device),
            device=weight.device,
            gradient_device=choice.gradient_device or weight.device,
        )
    return TraceEstimate(found)


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
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([int(psutil.virtual_memory().available), *_container_limit()])


def _container_limit() -> list[int]:
    """What is left of the memory limit of this process's control group, if it has one."""
    try:
        limit, used = (int((_CONTROL_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # The kernel drops cached files before anybody runs out of memory.
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
