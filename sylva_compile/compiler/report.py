"""`Report`: which weight gradients the compiled graphs sample, and why others stay dense."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightReport:
    """The gradient of one embedded weight in the compiled graphs that have run.

    Attributes:
        uses: 0 until a compiled graph has trained the weight. Each graph adds one for every place where it uses the
            weight, and adds them again when it looks the weight up anew, such as after a move of the model.
        reason: why a part of the gradient stayed dense, or None.
        narrowed: whether all its products read only the input channels that the mask needs.
        whole_reason: why an activation is read whole, or None.
    """

    uses: int = 0
    reason: str | None = None
    narrowed: bool = False
    whole_reason: str | None = None

    @property
    def rewritten(self) -> bool:
        """True when every product was replaced by a sampled one."""
        return self.uses > 0 and self.reason is None

    def __str__(self) -> str:
        if not self.uses:
            return "not compiled: no compiled graph has trained it yet (not called, or outside of torch.compile)"
        if self.reason is not None:
            return f"dense: {self.reason}"
        return "rewritten, narrow activation" if self.narrowed else f"rewritten, whole activation: {self.whole_reason}"


class Report(Mapping[str, WeightReport]):
    """A `WeightReport` for every weight that carries blocks, by name; prints as a table, with other kinds' weights.

    Attributes:
        others: a line for each embedded weight of another kind, by name. That of a pruned weight names the kernels that
            its products ran by last: "2:4, forward sparse at 512 tokens, input gradient not run".
    """

    def __init__(self, weights: Mapping[str, WeightReport], others: Mapping[str, str] | None = None) -> None:
        """Make the report of `weights`, by name, in the order of the model.

        Args:
            weights: those that carry blocks.
            others: lines about embedded weights of other kinds, by name: the kernels of pruned ones.
        """
        self._weights, self.others = dict(weights), dict(others or {})

    def __getitem__(self, name: str) -> WeightReport:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def rewritten(self) -> int:
        """Number of weights whose gradients are all sampled."""
        return sum(weight.rewritten for weight in self.values())

    def __str__(self) -> str:
        width = max((len(name) for name in (*self, *self.others)), default=0)
        lines = [f"{name:<{width}}  {weight}" for name, weight in (*self.items(), *self.others.items())]
        if self or not self.others:
            lines.append(f"{self.rewritten} of {len(self)} weights rewritten.")
        if self.others:
            lines.append(f"{len(self.others)} weights are pruned.")
        return "\n".join(lines)
