"""Descriptions of weights for estimators and for the choice of blocks."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sylva_compile.curvature.weight_spec import WeightSpec


def specs_of(weights: Mapping[str, Tensor], transposed: Iterable[str] = ()) -> dict[str, WeightSpec]:
    """Describe `weights`, by name; those named in `transposed` are stored inputs by outputs."""
    return {name: WeightSpec.of(name, weight, int(name not in transposed)) for name, weight in weights.items()}


def spec(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, name: str = "w") -> WeightSpec:
    """Describe a weight on the CPU."""
    return WeightSpec(name, (outputs, inputs), dtype, torch.device("cpu"))
