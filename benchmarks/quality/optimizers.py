"""The optimizers that the methods of a grid may be trained with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sylva_compile
from benchmarks.quality.tasks import head_of
from sylva_compile.optim import Muon

OPTIMIZERS = ("adamw", "muon")
"""The values of a method's option `optimizer`; "adamw" where it has none."""

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], torch.optim.Optimizer]


def for_dense(model: nn.Module, name: str) -> MakeOptimizer:
    """Return a function that makes an optimizer of torch for parameter groups of `model`."""
    if name == "adamw":
        return lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = embeddings | {id(parameter) for parameter in head_of(model)}
    return lambda groups: MuonAndAdamW(groups, others)


def for_blocks(name: str) -> MakeOptimizer:
    """Return a function that makes our optimizer for groups of which the first holds the blocks."""
    if name == "adamw":
        return sylva_compile.AdamW
    return lambda groups: Muon([groups[0], *({**group, "rule": "adamw"} for group in groups[1:])])


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices, and `torch.optim.AdamW` for embeddings, heads, norms and biases.

    This division is Muon's own (Jordan et al., 2024). Both step with the learning rate of their group.
    """

    def __init__(self, groups: Groups, elementwise: set[int]) -> None:
        """Divide each group; `elementwise` holds the ids of the matrices that AdamW steps."""
        divided: Groups = []
        for group in groups:
            for matrices in (True, False):
                chosen = [p for p in group["params"] if (p.dim() == 2 and id(p) not in elementwise) == matrices]
                if chosen:
                    divided.append({**group, "params": chosen, "matrices": matrices})
        super().__init__(divided, {})
        self._inner: list[torch.optim.Optimizer] = []
        for matrices in (True, False):
            own = [group for group in self.param_groups if group["matrices"] == matrices]
            if not own:
                continue
            copies = [dict(group) for group in own]
            inner: torch.optim.Optimizer = (
                torch.optim.Muon(copies, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
                if matrices
                else torch.optim.AdamW(copies, weight_decay=0.0, fused=True)
            )
            for group, filled in zip(own, inner.param_groups, strict=True):
                group.update(filled)
            # The same groups and states, so that learning rate schedules and measurements see them here.
            inner.param_groups, inner.state = own, self.state
            self._inner.append(inner)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step both."""
        assert closure is None, "the training loop has none"
        for inner in self._inner:
            inner.step()


def check(name: Any) -> str | None:
    """Return the error message for the option `optimizer`, or None if it is valid."""
    return None if name in OPTIMIZERS else f"optimizer={name!r}; use one of {OPTIMIZERS}"
