"""Trace the block gain on several parts of the samples, to separate the noise of the samples from the model's gain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.importance import GAIN_DAMPING, gain_scores
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.trace import weight_specs


@dataclass(frozen=True)
class Part:
    """The K-FAC means of one weight `[m, n]` over the tokens of some sentences, in float64.

    Attributes:
        gradient: the mean gradient Γ `[m, n]`.
        a_blocks: the diagonal blocks of A, `[ceil(n/b), b, b]`.
        g_blocks: the diagonal blocks of G, `[ceil(m/b), b, b]`.
        tokens: the number of tokens.
    """

    gradient: Tensor
    a_blocks: Tensor
    g_blocks: Tensor
    tokens: float

    def gain(self) -> Tensor:
        """Return the gain of each block summed over the tokens, `[ceil(m/b), ceil(n/b)]`."""
        return self.tokens * gain_scores(self.gradient, self.a_blocks, self.g_blocks, GAIN_DAMPING)


def trace_parts(model: nn.Module, parts: Sequence[Sequence[Any]], scope: str, block_size: int) -> dict[str, list[Part]]:
    """Trace each of `parts` (batches with labels) by itself; return the parts' means by name of the weight in scope."""
    weights = weights_in_scope(model, scope)
    specs = weight_specs(model, weights)
    config = SylvaConfig(score="gain", block_size=block_size)
    found: dict[str, list[Part]] = {name: [] for name in weights}
    for batches in parts:
        estimators = Estimators(specs, config)
        observe(model, weights, estimators, batches, num_samples=sum(len(batch["labels"]) for batch in batches))
        for name in weights:
            kfac = estimators[name]
            assert isinstance(kfac, Kfac)
            gradient, a, g = kfac.means()
            blocks = (a.diagonal_blocks(block_size), g.diagonal_blocks(block_size))
            found[name].append(Part(gradient, *blocks, float(kfac.tokens)))
    return found


def together(parts: Sequence[Part]) -> Part:
    """Return the means over the tokens of all `parts`, as one part."""
    tokens = sum(part.tokens for part in parts)
    gradient, a_blocks, g_blocks = (
        sum(part.tokens / tokens * getattr(part, name) for part in parts)
        for name in ("gradient", "a_blocks", "g_blocks")
    )
    return Part(gradient, a_blocks, g_blocks, tokens)


def agreed_gains(parts: Sequence[Part], damping: float = GAIN_DAMPING) -> Tensor:
    """Return the gain of each block per token, `[ceil(m/b), ceil(n/b)]`, from products of different parts' steps.

    The gain of a block is half the squared norm of its step. Products of two parts' steps replace this square:

        ½ ⟨L⁻¹ Γ_i M⁻ᵀ, L⁻¹ Γ_j M⁻ᵀ⟩, averaged over the pairs i ≠ j, with L and M of all parts (see `gain_scores`)

    Parts share no sentence, so their noise is independent: given the factors, the expected value is the gain of the
    model alone. The value is negative where parts disagree.
    """
    whole = together(parts)

    def gain(gradient: Tensor) -> Tensor:
        return gain_scores(gradient, whole.a_blocks, whole.g_blocks, damping)

    squares = sum(gain(part.gradient) for part in parts)
    mixed: Tensor = gain(sum(part.gradient for part in parts)) - squares
    return mixed / (len(parts) * (len(parts) - 1))


def best(scores: Tensor, share: float) -> Tensor:
    """Return the flat indices of the best `share` of all blocks, at least one."""
    return scores.flatten().topk(max(1, round(share * scores.numel()))).indices
