"""`TraceProgress`: the progress of a trace."""

from dataclasses import dataclass, field


@dataclass
class TraceProgress:
    """The progress of an observation.

    Attributes:
        batches: the number of batches observed.
        sequences: the number of sequences in these batches.
        latest: the number of sequences in the last batch.
        seen: the names of the weights whose gradients were observed, in the order of their first gradient.
        missed: the weights with a gradient that was not observed, or only in part, and the reason. They get no mask:
            the curvature of some uses of a weight alone would be worse than none.
    """

    batches: int = 0
    sequences: int = 0
    latest: int = 0
    seen: list[str] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
