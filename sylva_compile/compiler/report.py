"""`Report`: which weight gradients the compiled graphs sample, and why others stay dense."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightReport:
    """The weight-gradient products of one embedded weight in compiled graphs.

    Attributes:
        uses: the number of its weight-gradient products in the compiled graphs that ran; 0 means that none ran yet.
        reason: why some of them stayed dense, or None.
        narrowed: whether its products read activations restricted to the input channels that the mask needs.
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
    """A `WeightReport` for every embedded weight, by name; prints as a table."""

    def __init__(self, weights: Mapping[str, WeightReport]) -> None:
        """Make the report of `weights`, by name, in the order of the model."""
        self._weights = dict(weights)

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
        width = max((len(name) for name in self), default=0)
        lines = [f"{name:<{width}}  {weight}" for name, weight in self.items()]
        return "\n".join([*lines, f"{self.rewritten} of {len(self)} weights rewritten."])
