"""The estimators by name, one for every weight that is traced, and the input factors that they share."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.base import Curvature
from sylva_compile.curvature.baselines import SquaredGradient
from sylva_compile.curvature.blockwise import BlockFactor
from sylva_compile.curvature.dense import DenseFactor
from sylva_compile.curvature.expert_kfac import ExpertKfac
from sylva_compile.curvature.expert_squares import ExpertSquares
from sylva_compile.curvature.factor import NewFactor
from sylva_compile.curvature.input_factors import InputFactors
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.curvature.online import OnlineHierarchy, update_together
from sylva_compile.curvature.update_queue import UpdateQueue, group_bytes
from sylva_compile.curvature.weight_spec import WeightSpec
from sylva_compile.errors import ArgumentError, TraceError

NewEstimator = Callable[[WeightSpec, SylvaConfig, InputFactors, torch.device | None, ProcessGroup | None], Curvature]
"""Makes the estimator of a weight.

It gets the input factors that it shares, the device of its mean gradient, and the processes that split this by rows.
"""


def _kfac(
    spec: WeightSpec,
    config: SylvaConfig,
    inputs: InputFactors,
    gradient_device: torch.device | None,
    split_over: ProcessGroup | None,
) -> Curvature:
    if spec.experts > 1:
        assert split_over is None
        return ExpertKfac(
            spec,
            new_factor=inputs.new_factor,
            score=config.score,
            damping=config.damping,
            shared=inputs,
            gradient_device=gradient_device,
            budget=config.expert_budget,
        )
    return Kfac(
        spec,
        new_factor=inputs.new_factor,
        score=config.score,
        damping=config.damping,
        shared=inputs,
        gradient_device=gradient_device,
        split_over=split_over,
    )


def _squared_gradient(
    spec: WeightSpec,
    config: SylvaConfig,
    inputs: InputFactors,
    gradient_device: torch.device | None,
    split_over: ProcessGroup | None,
) -> Curvature:
    if spec.experts > 1:
        assert split_over is None
        return ExpertSquares(spec, device=gradient_device)
    return SquaredGradient(spec, device=gradient_device, split_over=split_over)


ESTIMATORS: dict[str, NewEstimator] = {"sylva": _kfac, "kfac": _kfac, "fisher": _squared_gradient}
"""The methods that look at data. "sylva" and "kfac" differ in their factors alone; see `factor_of`."""


def factor_of(config: SylvaConfig, queue: UpdateQueue[OnlineHierarchy] | None = None) -> NewFactor:
    """Return the function that makes a Kronecker factor.

    The score "gain" reads diagonal blocks alone, so that "sylva" keeps them alone for it.

    Args:
        config: the method and the score.
        queue: joins updates of several factors; only hierarchies, with their many small operations, use it.
    """
    if config.method == "kfac":
        return DenseFactor
    if config.score == "gain":
        return functools.partial(BlockFactor, block_size=config.block_size)
    return functools.partial(_online_hierarchy, config.num_partitions, config.rank, queue)


def waiting_bytes(config: SylvaConfig, device: torch.device) -> int:
    """Return the bytes that updates waiting in the queue take on `device` at most."""
    return group_bytes(device) if config.method == "sylva" and config.score != "gain" else 0


class Estimators:
    """The estimators of many weights, by name."""

    def __init__(
        self, specs: Mapping[str, WeightSpec], config: SylvaConfig, *, split_over: ProcessGroup | None = None
    ) -> None:
        """Make an estimator with sums of zero for every weight.

        Args:
            specs: the weights by name.
            config: the method and its settings.
            split_over: processes of which each keeps some rows of the mean gradients; None: this one keeps all.
        """
        self._specs, self._block_size = dict(specs), config.block_size
        self._queue = UpdateQueue(update_together)
        self._inputs = InputFactors(factor_of(config, self._queue))
        new, device = ESTIMATORS[config.method], gradient_device(config)
        self._estimators = {name: new(spec, config, self._inputs, device, split_over) for name, spec in specs.items()}

    def update(self, name: str, inputs: Tensor, output_gradients: Tensor, offsets: Tensor | None = None) -> None:
        """Add a batch of one weight: `inputs [T, n]` and `output_gradients [T, m]`.

        For stacked experts, tokens are sorted by expert, and `offsets [E]` says where those of each end.
        """
        with self._own_dtypes():
            self._estimators[name].update(inputs, output_gradients, offsets)

    def __getitem__(self, name: str) -> Curvature:
        """Return the estimator of one weight, outputs by inputs even if the weight is stored transposed."""
        return self._estimators[name]

    def end_batch(self) -> None:
        """Finish all updates of the batch; the caller calls this after each backward pass."""
        with self._own_dtypes():
            self._inputs.end_batch()
            self._queue.flush()

    def waiting(self) -> list[str]:
        """Return the names of the weights with batches that wait for `settle`."""
        return [name for name, estimator in self._estimators.items() if estimator.is_waiting]

    def settle(self, names: Collection[str]) -> None:
        """Finish updates of the weights `names` that processes make together; all of them name the same."""
        failure = None
        for name, estimator in self._estimators.items():
            if name in names:
                try:
                    with self._own_dtypes():
                        estimator.settle()
                except TraceError as error:
                    # The messages of the other weights must still be sent.
                    failure = failure or error
        if failure is not None:
            raise failure

    def combine(self, group: ProcessGroup) -> None:
        """Replace all statistics by their totals over the ranks of `group`."""
        with self._own_dtypes():
            self._inputs.combine(group)
            for estimator in self._estimators.values():
                estimator.combine(group)

    def scores(self, name: str) -> Tensor:
        """Return the scores of the weight's blocks, `[ceil(m/b), ceil(n/b)]`, transposed if the weight is stored so.

        Raises:
            TraceError: the curvature of the weight is not finite, or indefinite under any damping.
        """
        try:
            with self._own_dtypes():
                found = self._estimators[name].block_scores(self._block_size)
        except ArithmeticError as error:
            raise TraceError(f"{name}: no scores ({error}); scale its inputs, or leave it out of scope.") from error
        return self._specs[name].turned(found)

    def take_scores(self, name: str) -> Tensor:
        """Return `scores(name)` and drop the weight's statistics."""
        found = self.scores(name)
        self._forget(name)
        return found

    def greedy_map(self, name: str, count: int, allowed: Tensor) -> Tensor:
        """Return the map of `count` of the `allowed` blocks, chosen greedily (see `sylva_compile.curvature.greedy`).

        Args:
            name: a weight; its score is "greedy".
            count: number of blocks to choose; with expert_budget="expert", a multiple of the number of experts.
            allowed: `bool [ceil(m/b), ceil(n/b)]`, transposed if the weight is stored so.

        Returns:
            `bool`, shaped like `allowed`.

        Raises:
            ArgumentError: the curvature is not finite, or damping does not make it positive definite.
        """
        estimator = self._estimators[name]
        assert isinstance(estimator, Kfac | ExpertKfac)
        try:
            with self._own_dtypes():
                found = estimator.greedy_map(self._block_size, count, self._specs[name].turned(allowed))
        except ArithmeticError as error:
            raise ArgumentError(f"{name}: no greedy choice ({error}); raise damping, or use score='gain'.") from error
        return self._specs[name].turned(found)

    def take_greedy_map(self, name: str, count: int, allowed: Tensor) -> Tensor:
        """Return `greedy_map(name, count, allowed)` and drop the weight's statistics."""
        found = self.greedy_map(name, count, allowed)
        self._forget(name)
        return found

    @contextmanager
    def _own_dtypes(self) -> Iterator[None]:
        """Let no autocast around the trace round the products inside the block."""
        with ExitStack() as stack:
            for device in {spec.device.type for spec in self._specs.values()}:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def _forget(self, name: str) -> None:
        del self._estimators[name]
        self._inputs.forget(name)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor held, by name, not copied; callers read them between two batches."""
        return dict(self._named_state())

    def sharers(self) -> list[list[str]]:
        """Return the names of the weights grouped by shared input factor, for `load_state`."""
        return self._inputs.groups()

    def load_state(self, read: Callable[[str], Tensor], sharers: list[list[str]]) -> None:
        """Take over the state of other estimators, made with the same arguments.

        Args:
            read: gives the tensor of their `state()` by its name.
            sharers: their `sharers()`.
        """
        self._inputs.regroup(sharers)
        for name, tensor in self._named_state():
            tensor.copy_(read(name))

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        parts = {f"weight/{name}": estimator.state() for name, estimator in self._estimators.items()}
        parts |= {f"inputs/{readers[0]}": self._inputs.factor(readers[0]).state() for readers in self.sharers()}
        for name, tensors in parts.items():
            for at, tensor in enumerate(tensors):
                yield f"{name}/{at}", tensor


def gradient_device(config: SylvaConfig) -> torch.device | None:
    """Return the device that keeps mean gradients; None: that of their weights."""
    return None if config.gradient_device is None else torch.device(config.gradient_device)


def _online_hierarchy(
    depth: int,
    rank: int,
    queue: UpdateQueue[OnlineHierarchy] | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> OnlineHierarchy:
    return OnlineHierarchy(size, depth, rank, dtype=dtype, device=device, queue=queue)
