"""Choose blocks by score: exact numbers, a budget for each weight or one for all, a limit on input columns."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import ArgumentError
from sylva_compile.kernels.blocks import grid_shape

ChooseBlocks = Callable[[str, int, Tensor], Tensor]
"""Takes a weight's name, a number of blocks and a `bool` map of allowed ones; returns the map of the chosen ones."""


def select_blocks(
    scores: Mapping[str, Tensor],
    config: SylvaConfig,
    specs: Mapping[str, WeightSpec],
    choose: ChooseBlocks | None = None,
) -> dict[str, Tensor]:
    """Choose blocks by score.

    Args:
        scores: weight name to scores over its block grid, as the weight is stored; higher is better.
        config: the number of blocks, and the limit on columns.
        specs: weight name to its description.
        choose: chooses within a weight once the scores have fixed its number of blocks and its columns; None: the
            highest scores are taken.

    Returns:
        Weight name to `bool` block map. Exactly the wanted number is taken; ties go to the earlier position.

    Raises:
        ArgumentError: scores are not finite, or the column budget has no room for the wanted number.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ArgumentError(
                f"{name}: block scores are not finite; raise damping, or look for overflow in the model."
            )

    def groups(name: str) -> int:
        """Return the number of parts of the weight's blocks that get equal shares."""
        return specs[name].experts if config.expert_budget == "expert" else 1

    def highest(name: str, count: int, allowed: Tensor) -> Tensor:
        parts = scores[name].masked_fill(~allowed, -torch.inf).reshape(groups(name), -1)
        return torch.stack([_best(part, count // len(parts)) for part in parts]).view(allowed.shape)

    choose = choose or highest
    if config.allocation == "layer":
        maps = {}
        for name, score in scores.items():
            wanted = groups(name) * config.blocks(score.numel() // groups(name))
            allowed = _allowed(score, wanted, config, specs[name].input_axis)
            # All experts of a weight may use the same columns, so that room for all of them is room for each.
            _check_room(name, int(allowed.sum()), wanted, config)
            maps[name] = choose(name, wanted, allowed)
        return maps
    share = {name: config.blocks(score.numel()) for name, score in scores.items()}
    wanted = config.blocks(sum(score.numel() for score in scores.values()))
    allowed_of = {name: _allowed(score, share[name], config, specs[name].input_axis) for name, score in scores.items()}
    _check_room("all weights", int(sum(allowed.sum() for allowed in allowed_of.values())), wanted, config)
    flat = [score.masked_fill(~allowed_of[name], -torch.inf).flatten() for name, score in scores.items()]
    chosen = _best(torch.cat(flat), wanted).split([part.numel() for part in flat])
    counts = [int(part.sum()) for part in chosen]
    return {name: choose(name, count, allowed_of[name]) for name, count in zip(scores, counts, strict=True)}


def check_column_budget(specs: Mapping[str, WeightSpec], config: SylvaConfig) -> None:
    """Raise ArgumentError if the column budget has no room for the wanted number of blocks."""
    if config.column_budget is not None:
        for spec in specs.values():
            if spec.experts > 1 and spec.input_axis == 0:
                raise ArgumentError(
                    f"{spec.name} stores its experts transposed, and column_budget cannot limit the inputs that they "
                    "share; leave column_budget out, or the experts out of the scope."
                )
        grids = {
            name: torch.zeros(grid_shape(spec.shape, config.block_size), device="cpu") for name, spec in specs.items()
        }
        select_blocks(grids, config, specs)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return `bool`, true for the `count` highest of `scores`; the first of equal ones."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return torch.zeros(scores.shape, dtype=torch.bool, device="cpu").index_fill_(0, order, True)


def _allowed(scores: Tensor, wanted: int, config: SylvaConfig, axis: int) -> Tensor:
    """Return the map of blocks in the columns that the budget keeps.

    A column's value is the sum of its best `ceil(wanted / kept)` scores; the `kept` columns of highest value stay.
    """
    allowed = torch.ones(scores.shape, dtype=torch.bool, device="cpu")
    if config.column_budget is None:
        return allowed
    columns = scores.shape[axis]
    # The small term, as in SylvaConfig.blocks: 29% of 100 is 29 columns.
    kept = max(1, int(config.column_budget * columns + 1e-9))
    each = min(scores.shape[1 - axis], -(-wanted // kept))
    value = scores.topk(each, dim=1 - axis).values.sum(1 - axis)
    keep = _best(value, kept)
    return allowed & (keep[None, :] if axis == 1 else keep[:, None])


def _check_room(name: str, room: int, wanted: int, config: SylvaConfig) -> None:
    if room < wanted:
        raise ArgumentError(
            f"{name}: column_budget={config.column_budget} leaves room for {room} blocks, "
            f"sparsity={config.sparsity} wants {wanted}; raise either."
        )
