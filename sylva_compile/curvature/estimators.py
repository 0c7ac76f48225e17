"""One estimator for every weight that is traced, and the input factors that they share."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sylva_compile.curvature.base import Curvature
from sylva_compile.curvature.baselines import SquaredGradient
from sylva_compile.curvature.blockwise import BlockFactor
from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.factor import NewFactor
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import Kfac, Score
from sylva_compile.curvature.online import OnlineHierarchy, update_together
from sylva_compile.curvature.update_queue import UpdateQueue, group_bytes
from sylva_compile.errors import ArgumentError, TraceError


@dataclass(frozen=True)
class EstimatorChoice:
    """Which estimator, as `sylva_compile.trace_and_mask` takes it.

    Attributes:
        method: "sylva", "kfac" or "fisher".
        score: "gain", "greedy" or "paper"; "fisher" has but one.
        block_size: b.
        depth: splits K of hierarchical factors.
        rank: r of hierarchical factors.
        damping: fraction of a factor's mean diagonal; None: the score's own.
        gradient_device: where mean gradients are kept; None: beside their weights.
    """

    method: Literal["sylva", "kfac", "fisher"]
    score: Score
    block_size: int
    depth: int
    rank: int
    damping: float | None
    gradient_device: torch.device | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether `Estimators.take_greedy_map` chooses."""
        return self.method != "fisher" and self.score == "greedy"

    def new_factor(self, queue: UpdateQueue[OnlineHierarchy] | None = None) -> NewFactor:
        """What makes a Kronecker factor: "gain" reads diagonal blocks alone, so "sylva" keeps no more for it.

        Args:
            queue: where updates may wait for others; hierarchies alone, of many small operations, gain by it.
        """
        if self.method == "kfac":
            return DenseFactor
        if self.score == "gain":
            return functools.partial(BlockFactor, block_size=self.block_size)
        return functools.partial(_online_hierarchy, self.depth, self.rank, queue)

    def group_bytes(self, device: torch.device) -> int:
        """What updates that wait for others take on `device` at most."""
        return group_bytes(device) if self.method == "sylva" and self.score != "gain" else 0


class Estimators:
    """The estimators of many weights, by name."""

    def __init__(self, weights: Mapping[str, Tensor], input_axes: Mapping[str, int], choice: EstimatorChoice) -> None:
        """Zero.

        Args:
            weights: as stored; they give shapes, dtypes and devices.
            input_axes: of each weight, the axis of its inputs: 1 for `[m, n]`, 0 where it is stored transposed.
            choice: which estimator.
        """
        self._axes, self._block_size = input_axes, choice.block_size
        self._queue = UpdateQueue(update_together)
        new_factor = choice.new_factor(self._queue)
        self._inputs = InputFactors(new_factor)
        self._estimators: dict[str, Curvature] = {}
        for name, weight in weights.items():
            outputs, inputs = weight.shape if input_axes[name] == 1 else reversed(weight.shape)
            self._estimators[name] = (
                SquaredGradient(weight, outputs, inputs, device=choice.gradient_device)
                if choice.method == "fisher"
                else Kfac(
                    weight,
                    outputs,
                    inputs,
                    new_factor=new_factor,
                    score=choice.score,
                    damping=choice.damping,
                    shared=self._inputs,
                    reader=name,
                    gradient_device=choice.gradient_device,
                )
            )

    def update(self, name: str, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add a batch of one weight: `inputs [T, n]` and `output_gradients [T, m]`."""
        self._estimators[name].update(inputs, output_gradients)

    def __getitem__(self, name: str) -> Curvature:
        """The estimator of one weight, outputs by inputs whatever way the weight is stored."""
        return self._estimators[name]

    def end_batch(self) -> None:
        """To be called after each backward pass."""
        self._inputs.end_batch()
        self._queue.flush()

    def combine(self, group: ProcessGroup) -> None:
        """Add up the statistics of all ranks of `group`."""
        self._inputs.combine(group)
        for estimator in self._estimators.values():
            estimator.combine(group)

    def scores(self, name: str) -> Tensor:
        """Scores of the weight's blocks, `[ceil/b, ceil/b]` in its stored orientation.

        Raises:
            TraceError: the curvature of the weight is not finite, or not positive whatever the damping.
        """
        try:
            found = self._estimators[name].block_scores(self._block_size)
        except ArithmeticError as error:
            raise TraceError(f"{name}: no scores ({error}); scale its inputs, or leave it out of scope.") from error
        return self._turned(name, found)

    def take_scores(self, name: str) -> Tensor:
        """The same; the weight's statistics are dropped."""
        found = self.scores(name)
        self._forget(name)
        return found

    def greedy_map(self, name: str, count: int, allowed: Tensor) -> Tensor:
        """`count` of the `allowed` blocks, each chosen for what those before it have left to win.

        Args:
            name: of a weight whose score is "greedy".
            count: how many.
            allowed: `bool`, as the weight is stored.

        Returns:
            `bool`, as the weight is stored.

        Raises:
            ArgumentError: the curvature is not positive, and damping does not make it so.
        """
        estimator = self._estimators[name]
        assert isinstance(estimator, Kfac)
        try:
            found = estimator.greedy_map(self._block_size, count, self._turned(name, allowed))
        except ArithmeticError as error:
            raise ArgumentError(f"{name}: no joint choice ({error}); raise damping, or use score='gain'.") from error
        return self._turned(name, found)

    def take_greedy_map(self, name: str, count: int, allowed: Tensor) -> Tensor:
        """The same; the weight's statistics are dropped."""
        found = self.greedy_map(name, count, allowed)
        self._forget(name)
        return found

    def _turned(self, name: str, grid: Tensor) -> Tensor:
        """Outputs by inputs to the stored orientation, and back."""
        return grid if self._axes[name] == 1 else grid.t()

    def _forget(self, name: str) -> None:
        del self._estimators[name]
        self._inputs.forget(name)

    def state(self) -> dict[str, Tensor]:
        """Everything gathered, between two batches; the tensors themselves, not copies."""
        return dict(self._named_state())

    def sharers(self) -> list[list[str]]:
        """Names of the weights that share an input factor, as `load_state` wants them."""
        return self._inputs.groups()

    def load_state(self, read: Callable[[str], Tensor], sharers: list[list[str]]) -> None:
        """Go on from what `state` and `sharers` returned, of estimators made alike; `read` gives a tensor by name."""
        self._inputs.regroup(sharers)
        for name, tensor in self._named_state():
            tensor.copy_(read(name))

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        parts = {f"weight/{name}": estimator.state() for name, estimator in self._estimators.items()}
        parts |= {f"inputs/{readers[0]}": self._inputs.factor(readers[0]).state() for readers in self.sharers()}
        for name, tensors in parts.items():
            for at, tensor in enumerate(tensors):
                yield f"{name}/{at}", tensor


def _online_hierarchy(
    depth: int,
    rank: int,
    queue: UpdateQueue[OnlineHierarchy] | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> OnlineHierarchy:
    return OnlineHierarchy(size, depth, rank, dtype=dtype, device=device, queue=queue)
