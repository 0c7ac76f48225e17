"""What a trace will hold in memory beside the model, told before it runs."""

import logging
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


@dataclass(frozen=True)
class TraceEstimate:
    """Bytes that a trace holds beside the model, its activations and its gradients.

    Attributes:
        factors: of each weight, on its device. Weights that read the same inputs share a factor, which is counted for
            each of them here: who shares is known from the first batch on, so this is an upper bound.
        gradients: of each weight, its mean gradient, on `gradient_device`.
        scoring: at the end, one weight at a time, the working memory of its scores.
        device: where the weights live.
        gradient_device: where mean gradients are kept.
    """

    factors: Mapping[str, int]
    gradients: Mapping[str, int]
    scoring: int
    device: torch.device
    gradient_device: torch.device

    @property
    def by_device(self) -> dict[torch.device, int]:
        """The most that is held at once on each device."""
        held = {self.device: sum(self.factors.values()) + self.scoring}
        held[self.gradient_device] = held.get(self.gradient_device, 0) + sum(self.gradients.values())
        return held

    def __str__(self) -> str:
        lines = [f"{_size(self.factors[n]):>10} {_size(self.gradients[n]):>10}  {n}" for n in self.factors]
        total = f"{_size(sum(self.factors.values())):>10} {_size(sum(self.gradients.values())):>10}  in all"
        devices = ", ".join(f"{_size(count)} on {device}" for device, count in self.by_device.items())
        head = f"{'factors':>10} {'gradient':>10}  weight"
        return "\n".join(
            [head, *lines, total, f"At most {devices}, of which {_size(self.scoring)} to score one weight."]
        )


def estimate_bytes(weights: Mapping[str, nn.Parameter], choice: EstimatorChoice) -> TraceEstimate:
    """What the estimators of `weights` will hold."""
    factors, gradients, scoring = {}, {}, 0
    new_factor = choice.new_factor()
    for name, weight in weights.items():
        dtype = block_dtype(weight.dtype)
        gradients[name] = weight.numel() * dtype.itemsize
        factors[name] = 0
        if choice.method != "fisher":
            factors[name] = sum(new_factor(size, dtype, _META).nbytes for size in weight.shape)
        # Scores are computed in float64, from copies of the gradient and of the factors.
        scoring = max(scoring, 8 * _SCORING_COPIES * weight.numel() + 4 * factors[name])
    device = next(iter(weights.values())).device
    return TraceEstimate(factors, gradients, scoring, device, choice.gradient_device or device)


def check_fits(estimate: TraceEstimate) -> None:
    """Raise TraceError if a device has less memory free than the trace will hold; the log says what it will hold."""
    for device, wanted in estimate.by_device.items():
        free = free_bytes(device)
        log.info("Tracing holds up to %s on %s beside the model; %s are free.", _size(wanted), device, _size(free))
        if wanted > free:
            raise TraceError(
                f"Tracing would hold {_size(wanted)} on {device} beside the model, and {_size(free)} are free; use "
                "score='gain', a narrower scope, or gradient_device='cpu'."
            )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min([int(psutil.virtual_memory().available), *_container_limit()])


def _container_limit() -> list[int]:
    """What is left of the memory limit of this process's control group, if it has one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # The kernel drops cached files before anybody runs out of memory.
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):
        return []
    return [limit - used + int(cached)]


def _size(count: int) -> str:
    for unit, step in (("GiB", 30), ("MiB", 20)):
        if abs(count) >= 1 << step:
            return f"{count / (1 << step):.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
