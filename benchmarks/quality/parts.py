"""A trace of the block gain in several parts, so that what is the sample's can be told from what is the model's."""

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
    """Means over the tokens of some sentences, of one weight `[m, n]`, in float64.

    Attributes:
        gradient: Γ `[m, n]`.
        a_blocks: the diagonal blocks of A, `[ceil(n/b), b, b]`.
        g_blocks: those of G, `[ceil(m/b), b, b]`.
        tokens: how many.
    """

    gradient: Tensor
    a_blocks: Tensor
    g_blocks: Tensor
    tokens: float

    def gain(self) -> Tensor:
        """What each block could win on all of the tokens, `[ceil(m/b), ceil(n/b)]`."""
        return self.tokens * gain_scores(self.gradient, self.a_blocks, self.g_blocks, GAIN_DAMPING)


def trace_parts(model: nn.Module, parts: Sequence[Sequence[Any]], scope: str, block_size: int) -> dict[str, list[Part]]:
    """Of every weight in scope, what each of `parts` (batches with labels) shows."""
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
    """All tokens of several parts."""
    tokens = sum(part.tokens for part in parts)
    gradient, a_blocks, g_blocks = (
        sum(part.tokens / tokens * getattr(part, name) for part in parts)
        for name in ("gradient", "a_blocks", "g_blocks")
    )
    return Part(gradient, a_blocks, g_blocks, tokens)


def agreed_gains(parts: Sequence[Part], damping: float = GAIN_DAMPING) -> Tensor:
    """What each block could win on a token, from products of different parts' steps in place of squares.

        ½ ⟨L⁻¹ Γ_i M⁻ᵀ, L⁻¹ Γ_j M⁻ᵀ⟩, averaged over the pairs i ≠ j, with L and M of all parts (see `gain_scores`)

    Parts share no sentence and so no noise: given the factors, the expectation is that of the model alone. Negative
    where parts disagree.
    """
    whole = together(parts)

    def gain(gradient: Tensor) -> Tensor:
        return gain_scores(gradient, whole.a_blocks, whole.g_blocks, damping)

    squares = sum(gain(part.gradient) for part in parts)
    mixed: Tensor = gain(sum(part.gradient for part in parts)) - squares
    return mixed / (len(parts) * (len(parts) - 1))


def best(scores: Tensor, share: float) -> Tensor:
    """Places of the best `share` of all blocks, one at least."""
    return scores.flatten().topk(max(1, round(share * scores.numel()))).indices
