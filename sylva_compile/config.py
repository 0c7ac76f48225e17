"""`SylvaConfig`: the arguments of `trace_and_mask`, validated in one place.

`trace_and_mask`, `estimate`, the examples and the benchmarks read it; mask files and adapters store the fields that
choose blocks. Each field holds its help text, so that a command line needs no second list of fields.
"""

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args

from sylva_compile.errors import ArgumentError

Method = Literal["sylva", "kfac", "fisher", "magnitude", "lift", "random"]
Score = Literal["greedy", "gain", "paper"]
Allocation = Literal["layer", "global"]
ExpertBudget = Literal["layer", "expert"]
Scope = str | Sequence[str]
"""`"all-linear"`, a regular expression for the whole module name, or a list of module-name endings."""

_F = TypeVar("_F", bound=Callable[..., Any])


def _about(text: str, *, chooses: bool = True) -> dict[str, Any]:
    """Return the metadata of a field: its help, and whether it decides which blocks are chosen."""
    return {"help": text, "chooses": chooses}


@dataclass(frozen=True)
class SylvaConfig:
    """The settings that choose the blocks of a model.

    Raises:
        ArgumentError: a value is not one of those above.
    """

    scope: Scope = field(
        default="all-linear",
        metadata=_about(
            '"all-linear" (every Linear and Conv1D and stacked experts, but the language-model head or, in models of '
            "transformers, the classifier, and layers that choose experts), a regular expression for the whole module "
            "name, or a list of module-name endings; as PEFT's `target_modules`"
        ),
    )
    sparsity: float = field(
        default=0.98,
        metadata=_about(
            'share of the blocks that stays frozen, in [0, 1); with `allocation="layer"` of each weight\'s blocks, and '
            "every weight trains one block at least"
        ),
    )
    block_size: int = field(default=64, metadata=_about("b, rows and columns of a block, at least 8"))
    num_partitions: int = field(
        default=4, metadata=_about('depth K of the hierarchical factors of "sylva"; `score="gain"` does not use it')
    )
    rank: int = field(
        default=8,
        metadata=_about("rank r of the hierarchical factors' off-diagonal parts; of the weight's part for \"lift\""),
    )
    num_samples: int = field(
        default=1024,
        metadata=_about("sequences to trace, over all ranks together; the log warns if the loader ends before that"),
    )
    method: Method = field(
        default="sylva",
        metadata=_about(
            '"sylva", "kfac" (exact dense factors), "fisher" (squared gradients), "magnitude", "lift" (magnitude of '
            'the weight\'s part of rank r) or "random"'
        ),
    )
    score: Score = field(
        default="greedy",
        metadata=_about(
            'for "sylva" and "kfac": "greedy" takes one block after another, each by its gain after the Newton steps '
            'of those before it; "gain" takes the blocks of the highest gain, half the Newton decrement of a block '
            'alone; "paper" is the paper\'s importance, equations 19 and 20'
        ),
    )
    allocation: Allocation = field(
        default="layer",
        metadata=_about('"layer" (every weight keeps its share) or "global" (the best blocks of all weights)'),
    )
    expert_budget: ExpertBudget = field(
        default="layer",
        metadata=_about(
            'for stacked experts: "layer" (the blocks of a weight are chosen over all of its experts together) or '
            '"expert" (every expert trains the same number)'
        ),
    )
    column_budget: float | None = field(
        default=None,
        metadata=_about("at most this fraction of a weight's input block columns holds blocks; None: no limit"),
    )
    damping: float | None = field(
        default=None,
        metadata=_about(
            'fraction of a factor\'s mean diagonal that is added to it; None: 1e-3 for "paper", 0.1 for others'
        ),
    )
    gradient_device: str | None = field(
        default=None,
        metadata=_about(
            "device that keeps mean gradients, as large as the weights in float32, between batches, such as "
            '"cpu"; None: that of their weights',
            chooses=False,
        ),
    )
    checkpoint: str | None = field(
        default=None,
        metadata=_about(
            "file to which the trace is written every `checkpoint_every` batches. Where it exists the trace goes on "
            "from it, with the same result; the loader must give the same batches again. It is removed at the end. "
            "With a process group every rank has its own: `.rank0`, `.rank1` and so on are added to the name",
            chooses=False,
        ),
    )
    checkpoint_every: int = field(
        default=50, metadata=_about("batches between two writes of the checkpoint", chooses=False)
    )
    progress: bool = field(default=True, metadata=_about("show a progress bar", chooses=False))

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str):
            if not isinstance(self.scope, Iterable) or not all(isinstance(ending, str) for ending in self.scope):
                raise ArgumentError(f"scope={self.scope!r}; use 'all-linear', a regular expression or a list of names.")
            object.__setattr__(self, "scope", tuple(self.scope))
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        # Numbers of other libraries become those that JSON knows.
        for name in ("sparsity", "column_budget", "damping"):
            if isinstance(value := getattr(self, name), Real):
                object.__setattr__(self, name, float(value))
        for name in ("block_size", "num_partitions", "rank", "num_samples", "checkpoint_every"):
            if isinstance(value := getattr(self, name), Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))
        if not isinstance(self.sparsity, float) or not 0.0 <= self.sparsity < 1.0:
            raise ArgumentError(f"sparsity={self.sparsity!r}; use a number in [0, 1), such as 0.98 to train 2%.")
        if self.allocation not in get_args(Allocation):
            raise ArgumentError(f"allocation={self.allocation!r}; use 'layer' or 'global'.")
        if self.expert_budget not in get_args(ExpertBudget):
            raise ArgumentError(f"expert_budget={self.expert_budget!r}; use 'layer' or 'expert'.")
        if self.expert_budget == "expert" and self.allocation == "global":
            raise ArgumentError(
                "expert_budget='expert' gives every expert its share, and allocation='global' has none; leave one out."
            )
        budget = self.column_budget
        if budget is not None and not (isinstance(budget, float) and 0.0 < budget <= 1.0):
            raise ArgumentError(f"column_budget={self.column_budget!r}; use None or a number in (0, 1].")
        if self.method not in get_args(Method):
            raise ArgumentError(f"method={self.method!r}; use one of {', '.join(get_args(Method))}.")
        if self.score not in get_args(Score):
            raise ArgumentError(f"score={self.score!r}; use 'greedy', 'gain' or 'paper'.")
        check_block_size(self.block_size)
        _check_count("num_samples", self.num_samples, 1)
        _check_count("checkpoint_every", self.checkpoint_every, 1)
        _check_count("num_partitions", self.num_partitions, 0)
        if self.num_partitions > 20:
            raise ArgumentError(
                f"num_partitions={self.num_partitions} is a depth, and makes 2 to that power parts; use 2 to 6."
            )
        _check_count("rank", self.rank, 0)
        if self.damping is not None and not (isinstance(self.damping, float) and 0 < self.damping < math.inf):
            raise ArgumentError(f"damping={self.damping!r}; use None or a fraction above 0.")
        if self.gradient_device is not None:
            object.__setattr__(self, "gradient_device", _usable_device(self.gradient_device))

    @classmethod
    def resolve(cls, config: "SylvaConfig | None", options: Mapping[str, Any]) -> "SylvaConfig":
        """Return `config`, or the defaults, with `options` in place of its fields.

        Raises:
            ArgumentError: an option has no field, or a value cannot be used.
        """
        names = [one.name for one in fields(cls)]
        if unknown := options.keys() - set(names):
            raise ArgumentError(f"There is no option {min(unknown)!r}; use one of {', '.join(names)}.")
        if config is not None and not isinstance(config, cls):
            raise ArgumentError(f"config is a {type(config).__name__}; give a SylvaConfig.")
        return cls(**options) if config is None else dataclasses.replace(config, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON knows."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return found | {"scope": found["scope"] if isinstance(found["scope"], str) else list(found["scope"])}

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SylvaConfig":
        """Read what `to_json` wrote.

        Raises:
            ArgumentError: `text` is no JSON object, has a field that is not known, or a value that cannot be used.
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ArgumentError(f"The settings are no JSON ({error}); give what SylvaConfig.to_json wrote.") from error
        if not isinstance(found, dict):
            raise ArgumentError(f"The settings are a {type(found).__name__}; give a JSON object of fields.")
        return cls.resolve(None, found)

    def provenance(self) -> dict[str, Any]:
        """Return the fields that decide which blocks are chosen; mask files and adapters keep them."""
        chooses = {one.name for one in fields(self) if one.metadata["chooses"]}
        return {name: value for name, value in self.to_dict().items() if name in chooses}

    @property
    def needs_data(self) -> bool:
        """Whether the method needs a loader."""
        return self.method not in ("magnitude", "lift", "random")

    @property
    def is_greedy(self) -> bool:
        """Whether blocks are chosen one after another."""
        return self.method in ("sylva", "kfac") and self.score == "greedy"

    def blocks(self, total: int) -> int:
        """Return the number of blocks to train out of `total`: the nearest whole number, halves up, at least one."""
        # The small term undoes rounding in binary fractions: 30% of 35 is 10.5, not a little less.
        return max(1, int((1 - self.sparsity) * total + 0.5 + 1e-9))


def check_block_size(block_size: int) -> None:
    """Raise ArgumentError unless `block_size` is an integer of 8 or more."""
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 8:
        raise ArgumentError(f"block_size={block_size!r}; use an integer of 8 or more (16 to 128 is usual).")


def takes_config(function: _F) -> _F:
    """Replace `**options` in the signature of `function` by the fields of SylvaConfig, for `help` and editors."""
    signature = inspect.signature(function)
    given = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in fields(SylvaConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*given, *options])  # type: ignore[attr-defined]
    return function


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}={value!r}; use an integer of {least} or more.")


def _usable_device(device: Any) -> str:
    """Return the name of `device`. Raises ArgumentError unless tensors can be made there."""
    # Settings alone do not need torch, which takes seconds to import; the help of the command line reads them.
    import torch

    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ArgumentError(f"gradient_device={device!r} cannot be used here; use None or 'cpu'.")
    return str(found)


# Fields tell their help once: the documentation of the class is made of it.
SylvaConfig.__doc__ = inspect.cleandoc(SylvaConfig.__doc__ or "").replace(
    "Raises:",
    "Attributes:\n"
    + "".join(f"    {one.name}: {one.metadata['help']}.\n" for one in fields(SylvaConfig))
    + "\nRaises:",
)
