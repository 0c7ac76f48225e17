"""The options of the subcommands, beside those of `SylvaConfig`: each field with its type, default and help."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sylva_compile.errors import ArgumentError, UsageError
from sylva_compile.schedules.moving_options import Choose

Optimizer = Literal["adamw", "muon"]
Inner = Literal["inductor", "aot_eager"]
Format = Literal["dense", "shira"]


def _about(text: str, **more: Any) -> dict[str, Any]:
    return {"help": text, **more}


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    model: str = field(
        metadata=_about(
            "folder written by save_pretrained, name of a model on the Hugging Face hub, or GGUF file", metavar="MODEL"
        )
    )
    bf16: bool = field(default=False, metadata=_about("frozen weights in bfloat16; the trained blocks stay float32"))


@dataclass(frozen=True)
class DataConfig:
    """The data, and how a row becomes a sequence of tokens.

    Raises:
        ArgumentError: a number is out of its range.
        UsageError: options do not go together.
    """

    data: str | None = field(
        default=None,
        metadata=_about(
            "CSV, TSV, JSON, JSONL or text file, or name of a data set on the Hugging Face hub. Columns named "
            '"messages", or "prompt" and "response", go through the model\'s chat template',
            metavar="DATA",
        ),
    )
    split: str = field(default="train", metadata=_about("of a data set on the hub"))
    subset: str | None = field(default=None, metadata=_about("of a data set on the hub"))
    column: str | None = field(
        default=None, metadata=_about("column with texts, each a sequence with loss on all of it")
    )
    prompt_template: str | None = field(
        default=None,
        metadata=_about(r'prompt made of columns, such as "Q: {question}\nA: "; it carries no loss'),
    )
    response: str | None = field(
        default=None, metadata=_about("column with the answer to --prompt-template, which alone carries loss")
    )
    max_length: int = field(default=256, metadata=_about("tokens in a sequence, at most"))
    batch_size: int = field(default=8, metadata=_about("sequences in a batch, on each device"))
    held_out: float = field(
        default=0.1,
        metadata=_about(
            "share of the sequences that is neither traced nor trained on, and is measured before and after training; "
            "0: none"
        ),
    )
    seed: int = field(default=0, metadata=_about("of all random choices"))

    def __post_init__(self) -> None:
        _check_positive(self, "max_length", "batch_size")
        if not 0 <= self.seed < 1 << 32:
            raise ArgumentError(f"seed={self.seed}; use a number from 0 to {(1 << 32) - 1}.")
        if not 0 <= self.held_out < 1:
            raise ArgumentError(f"held_out={self.held_out}; use a share from 0 to 1, without 1.")
        if (self.prompt_template is None) != (self.response is None):
            missing = "--response" if self.response is None else "--prompt-template"
            raise UsageError(f"{missing} is missing; --prompt-template and --response go together.")
        if self.column is not None and self.response is not None:
            raise UsageError("--column and --response exclude each other; use --column for loss on all of a text.")


@dataclass(frozen=True)
class FinetuneConfig:
    """The training.

    Raises:
        ArgumentError: a number is out of its range.
        UsageError: options do not go together.
    """

    out: Path = field(default=Path("out/adapter"), metadata=_about("folder for the adapter and checkpoints"))
    masks: Path | None = field(
        default=None, metadata=_about("file of masks that `trace` wrote, in place of a new trace", metavar="FILE")
    )
    optimizer: Optimizer = field(default="muon", metadata=_about("optimizer of the blocks"))
    lr: float = field(
        default=1e-2, metadata=_about("learning rate; it falls linearly to 0; adamw takes a third to a tenth of muon's")
    )
    epochs: float = field(default=1.0, metadata=_about("passes over the data"))
    steps: int | None = field(default=None, metadata=_about("number of steps, in place of --epochs"))
    gradient_accumulation: int = field(default=1, metadata=_about("batches in a step"))
    gradient_checkpointing: bool = field(default=False, metadata=_about("less memory, more time"))
    every: int = field(default=0, metadata=_about("steps between moves of the blocks; 0: they stay"))
    choose: Choose = field(default="random", metadata=_about("how moving blocks find their next places"))
    inner: Inner = field(default="inductor", metadata=_about("compiler; aot_eager is for debugging"))
    save_every: int = field(default=0, metadata=_about("steps between checkpoints; 0: only where it is interrupted"))
    log_every: int = field(default=10, metadata=_about("steps between lines with the loss"))
    resume: bool = field(
        default=False, metadata=_about("go on with the run in --out that was interrupted, with the same options")
    )

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "epochs", "gradient_accumulation", "log_every")
        _check_positive(self, "every", "save_every", zero=True)
        if self.steps is not None:
            _check_positive(self, "steps")
        if self.choose != "random" and not self.every:
            raise UsageError(f"--choose {self.choose} is for blocks that move; give --every, too.")


@dataclass(frozen=True)
class TraceConfig:
    """Where `trace` writes."""

    out: Path = field(default=Path("out/masks.safetensors"), metadata=_about("file for the masks", metavar="FILE"))


@dataclass(frozen=True)
class InspectConfig:
    """The file or folder that `inspect` reads, and the form in which it prints."""

    path: Path = field(metadata=_about("folder of an adapter or of a run, or file of masks", positional=True))
    json: bool = field(default=False, metadata=_about("print JSON"))


@dataclass(frozen=True)
class AdapterConfig:
    """A base, an adapter, and where the result goes."""

    model: str = field(metadata=_about("base: folder, name on the Hugging Face hub, or GGUF file", metavar="MODEL"))
    adapter: Path = field(metadata=_about("folder that save_adapter or `finetune` wrote"))
    out: Path = field(metadata=_about("folder to write; it must not exist, or be empty"))
    dequantise: bool = field(default=False, metadata=_about("write dense layers where the base's are quantised"))


@dataclass(frozen=True)
class ReportConfig:
    """An adapter, its base, and where the page about it goes."""

    model: str = field(metadata=_about("base: folder, name on the Hugging Face hub, or GGUF file", metavar="MODEL"))
    adapter: Path = field(metadata=_about("folder that save_adapter or `finetune` wrote"))
    out: Path = field(default=Path("out/report.html"), metadata=_about("HTML file to write", metavar="FILE"))
    log: Path | None = field(
        default=None,
        metadata=_about("the Trainer's output folder, for the curves; where it is left out, the adapter's folder"),
    )


@dataclass(frozen=True)
class ExportConfig:
    """The format of an export."""

    format: Format = field(
        default="dense",
        metadata=_about("dense: an ordinary checkpoint, as `merge` writes; shira: an adapter of PEFT (SHiRA)"),
    )


def _check_positive(options: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(options, name)
        if not (value >= 0 if zero else value > 0) or value == math.inf:
            raise ArgumentError(f"{name}={value}; use a number {'from 0 on' if zero else 'above 0'}.")
