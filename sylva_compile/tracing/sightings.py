"""`Sightings`: takes the operands of weight gradients from compiled graphs, and finds the gradients that gave none."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from sylva_compile.errors import TraceError
from sylva_compile.tracing.progress import TraceProgress


class Sightings:
    """The gradients that the passes of a trace show."""

    def __init__(
        self,
        names: Mapping[int, str],
        update: Callable[[str, Tensor, Tensor, Tensor | None], None],
        done: TraceProgress,
    ) -> None:
        """Start without any.

        Args:
            names: the name of each weight by the address of the tensor that stands for it in graphs.
            update: receives a weight's name, `inputs [T, n]`, `output_gradients [T, m]`, and for stacked experts where
                the tokens of each end, `int[E]`.
            done: notes the weights that were seen, and missed.
        """
        self._names, self._update, self._done = names, update, done
        self._reasons: dict[str, str] = {}
        # Dynamo may keep the backend that calls this, and must not keep the estimators behind `update` with it.
        self.miss = partial(_note_reason, names, self._reasons)
        """Receives a weight, and the reason for which a graph computes its gradient itself."""
        self._sums: dict[str, Tensor] = {}

    def listen(self, weight: Tensor, lhs: Tensor, rhs: Tensor, activation_is_lhs: bool, offsets: Tensor | None) -> None:
        """Receive the operands of a gradient; a listener of `kernels.observe`."""
        name = self._names.get(weight.data_ptr())
        if name is None:
            # The model uses this parameter but does not list it; its gradient is not wanted.
            return
        inputs, gradients = (lhs, rhs) if activation_is_lhs else (rhs, lhs)
        # A sum in float16 could overflow although every element is finite.
        self._sums[name] = gradients.sum(dtype=torch.float64)
        self._update(name, inputs.detach(), gradients.detach(), offsets)
        if name not in self._done.seen:
            self._done.seen.append(name)

    def check(self, weights: Iterable[str], gradients: Iterable[Tensor | None]) -> None:
        """Note the weights whose gradient a pass did not show.

        Args:
            weights: the names.
            gradients: what autograd computed for each.

        Raises:
            TraceError: an output gradient is not finite.
        """
        sums, self._sums = self._sums, {}
        weights = list(weights)
        if sums and not bool(torch.isfinite(torch.stack(list(sums.values()))).all()):
            bad = next(name for name in weights if name in sums and not bool(torch.isfinite(sums[name])))
            raise TraceError(
                f"The loss is finite but the output gradient of {bad} is not; scale the loss or widen its dtype."
            )
        for name, gradient in zip(weights, gradients, strict=True):
            # An observed gradient is a zero that `sylva::observe` returned, expanded with strides of 0. That of a probe
            # is a scalar.
            if gradient is not None and (any(gradient.stride()) or not gradient.dim()) and bool(gradient.any()):
                why = "it is used outside of the graphs that torch.compile makes"
                self._done.missed.setdefault(name, self._reasons.get(name, why))


def _note_reason(names: Mapping[int, str], reasons: dict[str, str], weight: Tensor, reason: str) -> None:
    name = names.get(weight.data_ptr())
    if name is not None:
        reasons[name] = reason
