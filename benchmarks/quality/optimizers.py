"""The optimizers that the methods of a grid may be trained with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_optimizer import GaLore
from torch import nn

import sylva_compile
from benchmarks.quality.float32_muon import Float32Muon
from benchmarks.quality.tasks import head_of
from sylva_compile.optim import Muon

OPTIMIZERS = ("adamw", "muon", "galore")
"""The values of a method's option `optimizer`; "adamw" where it has none."""

OPTIONS = frozenset({"optimizer", "momentum", "precision", "rank", "refresh"})
"""The options of a method that choose its optimizer.

`momentum` is Muon's, or the first of AdamW's betas. `precision` is "float32" where torch's Muon is to multiply in it;
ours always does. GaLore alone has `rank`, that of the space of its moments, and `refresh`, the number of steps after
which it chooses another space.
"""

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], torch.optim.Optimizer]


def for_dense(model: nn.Module, options: Mapping[str, Any]) -> MakeOptimizer:
    """Return a function that makes an optimizer of torch for parameter groups of `model`."""
    betas = (options.get("momentum", 0.9), 0.999)
    if options.get("optimizer", "adamw") == "adamw":
        return lambda groups: torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = embeddings | {id(parameter) for parameter in head_of(model)}
    if options["optimizer"] == "muon":
        muon = Float32Muon if options.get("precision") == "float32" else _torch_muon
        return lambda groups: MuonAndAdamW(groups, others, options.get("momentum", 0.95), muon)
    return lambda groups: _galore(groups, others, options, betas)


def for_blocks(options: Mapping[str, Any]) -> MakeOptimizer:
    """Return a function that makes our optimizer for groups of which the first holds the blocks."""
    if options.get("optimizer", "adamw") == "adamw":
        return lambda groups: sylva_compile.AdamW(groups, betas=(options.get("momentum", 0.9), 0.999))
    momentum = options.get("momentum", 0.95)
    return lambda groups: Muon([groups[0], *({**each, "rule": "adamw"} for each in groups[1:])], momentum=momentum)


def _galore(
    groups: Groups, elementwise: set[int], options: Mapping[str, Any], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return GaLore (Zhao et al., 2024) for matrices, and AdamW for the rest."""
    low_rank = {
        "rank": options["rank"],
        "update_proj_gap": options["refresh"],
        # As its authors have it. The learning rate of the other parameters is not scaled.
        "scale": 0.25,
        "projection_type": "std",
    }
    divided = [
        {**group, "params": chosen, **(low_rank if matrices else {})}
        for group in groups
        for matrices, chosen in _divided(group["params"], elementwise)
    ]
    return GaLore(divided, betas=betas)


def _divided(parameters: Sequence[nn.Parameter], elementwise: set[int]) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """Yield whether the parameters are matrices to step as such, and the parameters; those in `elementwise` are not."""
    for matrices in (True, False):
        chosen = [p for p in parameters if (p.dim() == 2 and id(p) not in elementwise) == matrices]
        if chosen:
            yield matrices, chosen


def _torch_muon(groups: Groups, momentum: float) -> torch.optim.Muon:
    return torch.optim.Muon(groups, weight_decay=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices, and `torch.optim.AdamW` for embeddings, heads, norms and biases.

    This division is Muon's own (Jordan et al., 2024). Both step with the learning rate of their group.
    """

    def __init__(
        self,
        groups: Groups,
        elementwise: set[int],
        momentum: float = 0.95,
        muon: Callable[..., torch.optim.Optimizer] = _torch_muon,
    ) -> None:
        """Divide each group.

        Args:
            groups: parameter groups.
            elementwise: the ids of the matrices that AdamW steps.
            momentum: Muon's.
            muon: makes Muon of the groups of matrices and of `momentum=`.
        """
        divided: Groups = []
        for group in groups:
            for matrices, chosen in _divided(group["params"], elementwise):
                divided.append({**group, "params": chosen, "matrices": matrices})
        super().__init__(divided, {})
        self._inner: list[torch.optim.Optimizer] = []
        for matrices in (True, False):
            own = [group for group in self.param_groups if group["matrices"] == matrices]
            if not own:
                continue
            copies = [dict(group) for group in own]
            inner: torch.optim.Optimizer = (
                muon(copies, momentum=momentum) if matrices else torch.optim.AdamW(copies, weight_decay=0.0, fused=True)
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


def check(options: Mapping[str, Any]) -> str | None:
    """Return the error message for a method's OPTIONS, or None if they are valid."""
    name, momentum = options.get("optimizer", "adamw"), options.get("momentum", 0.9)
    if name not in OPTIMIZERS:
        return f"optimizer={name!r}; use one of {OPTIMIZERS}"
    if name == "galore" and options["kind"] != "full":
        return "optimizer='galore' is for kind='full'; use 'adamw' or 'muon'"
    for each in ("rank", "refresh"):
        if (each in options) != (name == "galore"):
            return f"{each} {'given' if each in options else 'missing'}; optimizer='galore' takes it, and no other"
    if "precision" in options and (options["precision"] != "float32" or name != "muon" or options["kind"] == "blocks"):
        return f"precision={options['precision']!r}; torch's Muon alone takes it, and only 'float32'"
    if not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        return f"momentum={momentum!r}; use a number from 0 to 1, without 1"
    return None
