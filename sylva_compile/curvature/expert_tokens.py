"""The tokens of stacked experts: which of them count, and which expert each was routed to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sylva_compile.curvature.base import live_tokens


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The live tokens of one batch, sorted by expert.

    Attributes:
        inputs: `[T, n]`.
        output_gradients: `[T, m]`.
        live: which rows of the batch these are, `bool[S]`.
        counts: how many tokens each expert has, `int64[E]`.
    """

    inputs: Tensor
    output_gradients: Tensor
    live: Tensor
    counts: Tensor

    def each(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of every expert that has tokens, its inputs `[T_e, n]` and output gradients `[T_e, m]`."""
        start = 0
        for expert, count in enumerate(self.counts.tolist()):
            if count:
                own = slice(start, start + count)
                yield expert, self.inputs[own], self.output_gradients[own]
            start += count


def expert_tokens(inputs: Tensor, output_gradients: Tensor, offsets: Tensor) -> ExpertTokens:
    """Return the live tokens of a batch.

    A token is live if `live_tokens` says so, compared with the tokens of all experts, and if its inputs are not all
    zero: Llama 4 hands every token to every expert, as zeros to those that it was not routed to. Rows from
    `offsets[E-1]` on belong to no expert.

    Args:
        inputs: `[S, n]`, sorted by expert.
        output_gradients: `[S, m]`, sorted by expert.
        offsets: `int32[E]` or `int64[E]`, where the rows of each expert end.
    """
    rows, experts = inputs.shape[0], offsets.shape[0]
    places = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    of_row = torch.searchsorted(offsets, places, right=True)
    live = live_tokens(output_gradients) & inputs.any(1) & (of_row < experts)
    counts = torch.bincount(of_row[live], minlength=experts)
    if not bool(live.all()):
        inputs, output_gradients = inputs[live], output_gradients[live]
    return ExpertTokens(inputs, output_gradients, live, counts)
