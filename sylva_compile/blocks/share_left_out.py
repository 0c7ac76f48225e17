"""Says in the log which share of a model a scope leaves frozen, and why."""

import logging
import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from sylva_compile.blocks.scope import is_linear, output_head, plain_name, unwrap
from sylva_compile.quantised.registry import shape_of

log = logging.getLogger(__name__)

_STACKED = "in parameters of three or more dimensions, such as experts"


def log_share_left_out(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Log the share of the model's elements outside of `weights`, and why: a warning where whole experts stay frozen.

    Models with a mixture of experts keep most of their elements in parameters of three dimensions.
    """
    model = unwrap(model)
    inside = {id(weight) for weight in weights.values()}
    head = output_head(model)
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    sizes: Counter[str] = Counter()
    first: dict[str, str] = {}
    seen: set[int] = set()
    total = 0
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = math.prod(shape_of(parameter))
            total += size
            if id(parameter) not in inside:
                why = _why_left_out(module, parameter, is_head=id(parameter) in of_head)
                sizes[why] += size
                first.setdefault(why, plain_name(f"{prefix}.{attribute}" if prefix else attribute))
    if not sizes:
        return
    parts = ", ".join(f"{count / total:.1%} {why} ({first[why]} first)" for why, count in sizes.most_common())
    stacked = sizes[_STACKED] / total
    log.log(
        logging.WARNING if stacked >= 0.05 else logging.INFO,
        "The scope holds %.1f%% of the model's %s elements. Left out: %s.",
        100 * (1 - sum(sizes.values()) / total),
        f"{total:,}",
        parts,
    )


def _why_left_out(module: nn.Module, parameter: Tensor, *, is_head: bool) -> str:
    if parameter.dim() > 2:
        return _STACKED
    if is_head:
        return "in the output head"
    if parameter.dim() < 2:
        return "in biases, norms and other vectors"
    if isinstance(module, nn.Embedding):
        return "in token embeddings"
    return "in linear layers that the scope does not name" if is_linear(module) else "in modules that are not linear"
