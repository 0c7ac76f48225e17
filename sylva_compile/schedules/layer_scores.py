"""The scores of layers, and the layers that are drawn by them (IST and RST; Yao et al., EMNLP 2024).

Each layer i has a score I_i, 0 at first. A step trains a share of the layers, drawn without replacement with weights
sigmoid(-I). RST leaves the scores at 0. IST tries three actions every few steps, each of half the layers and drawn with
weights sigmoid(I). Action k gives loss_k while the trained change of its layers is scaled down. Then

    r_k = exp(-loss_k) - mean over the actions of exp(-loss)
    I_i += 10 r_k p_i (1 - p_i)     for each layer i of action k, with p = sigmoid(I) from before the update

A layer whose trained change lowers the loss gets a lower score, and is trained more often.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_ACTIONS, _ACTION_SHARE, _RATE = 3, 0.5, 10.0
_MOST_TRIES = 100
"""Tries to draw another action by weight; after so many, layers are drawn with equal weights."""


class LayerScores:
    """Scores of layers, from which layers are drawn.

    Attributes:
        scores: I, `float64[layers]` on the CPU.
        generator: of the draws, on the CPU.
    """

    def __init__(self, layers: int, generator: torch.Generator) -> None:
        """Give each of `layers` layers the score 0."""
        self.scores = torch.zeros(layers, dtype=torch.float64, device="cpu")
        self.generator = generator

    def draw(self, size: int) -> list[int]:
        """Return `size` layers to train, in ascending order."""
        return self._draw(torch.sigmoid(-self.scores), size)

    def draw_actions(self) -> list[list[int]]:
        """Return three distinct sets of half the layers; two layers have but two such sets."""
        count = len(self.scores)
        size = max(1, int(_ACTION_SHARE * count))
        weights, equal = torch.sigmoid(self.scores), torch.ones_like(self.scores)
        actions: list[list[int]] = []
        tries = 0
        while len(actions) < min(_ACTIONS, math.comb(count, size)):
            action = self._draw(weights if tries < _MOST_TRIES else equal, size)
            tries += 1
            if action not in actions:
                actions.append(action)
        return actions

    def update(self, actions: Sequence[Sequence[int]], losses: Tensor) -> None:
        """Change the scores of the layers of `actions` by the losses of these, `float64[actions]`."""
        rewards = torch.exp(-losses)
        if not bool(rewards.isfinite().all()):
            log.warning("The scores of the layers stay as they are: exp(-loss) of a batch is not finite.")
            return
        rewards -= rewards.mean()
        p = torch.sigmoid(self.scores)
        for action, reward in zip(actions, rewards, strict=True):
            self.scores[list(action)] += _RATE * reward * (p * (1 - p))[list(action)]

    def _draw(self, weights: Tensor, size: int) -> list[int]:
        """Draw `size` layers without replacement; `weights` is `float64[layers]`."""
        # A weight of 0 could not be drawn, not even where nothing else is left.
        weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)
        return sorted(torch.multinomial(weights, size, generator=self.generator).tolist())
