"""Teach a small language model to write docstrings, by training 5% of it that moves, and compare size, loss and time.

SmolLM2-135M-Instruct, installed with pip, reads the signature of a function of Python's standard library and answers
with its docstring. Before, it answers with code; after a few dozen steps, with a docstring. The text is on every
machine, the demo needs no network, and it takes a few minutes on a small CPU:

    python examples/demo.py

It prints answers and losses before and after on modules that it was not trained on, and a table of sizes and times, and
writes the adapter and a page about the changes to `out/demo`.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from functions import Function, collect_functions, split_by_package
from rich.console import Console
from rich.table import Table
from smollm2 import NotInstalledError, smollm2
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

import sylva_compile
from sylva_compile.optim import Muon
from sylva_compile.reports import changes_of, history_of, write_report
from sylva_compile.schedules import MovingBlocks

TITLE = "A language model learns to write docstrings"
LENGTH = 64
"""Tokens of every sequence, padded: with one shape, the compiler makes one graph."""
BATCH = 8
IGNORED = -100
"""Label of positions without loss, as in transformers."""

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Size of the run."""

    steps: int = 40
    held_out: int = 48
    questions: int = 3
    answer_tokens: int = 32
    traced: int = 16
    timed: int = 3
    sparsity: float = 0.95
    block_size: int = 32
    every: int = 8
    learning_rate: float = 6e-3
    inner: str = "inductor"


SMALL = Settings(steps=4, held_out=16, questions=1, answer_tokens=4, traced=8, timed=1, block_size=8, inner="aot_eager")


class Writer:
    """Makes prompts and batches of functions, and reads the model's answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use the tokenizer of a model that chats."""
        self.tokenizer = tokenizer

    def prompt(self, function: Function) -> list[int]:
        """Return the tokens of the question, up to where the answer begins."""
        question = f"Write the docstring of {function.signature} in {function.module}."
        # Without words for the system, the template puts in longer ones.
        messages = [{"role": "system", "content": "You write docstrings."}, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def short_ones(self, functions: Sequence[Function]) -> list[Function]:
        """Return the functions whose question and docstring take at most `LENGTH` tokens."""
        return [function for function in functions if len(self._row(function)[0]) == LENGTH]

    def batches(self, functions: Sequence[Function]) -> list[Batch]:
        """Return batches of `BATCH` sequences, `[BATCH, LENGTH]` each; only answers have labels. A rest is left out."""
        rows = [self._row(function) for function in functions]
        columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
        batches = zip(*(column.split(BATCH) for column in columns), strict=True)
        names = ("input_ids", "attention_mask", "labels")
        return [dict(zip(names, batch, strict=True)) for batch in batches if len(batch[0]) == BATCH]

    @torch.no_grad()
    def answer(self, model: PreTrainedModel, function: Function, tokens: int) -> str:
        """Return the most likely answer of at most `tokens` tokens."""
        ids = torch.tensor([self.prompt(function)])
        written: Any = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self._filler(),
        )
        text: str = self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _row(self, function: Function) -> tuple[list[int], list[int], list[int]]:
        question = self.prompt(function)
        answer = self.tokenizer(function.docstring, add_special_tokens=False)["input_ids"]
        answer = [*answer, self.tokenizer.eos_token_id]
        tokens, labels = question + answer, [IGNORED] * len(question) + answer
        gap = max(0, LENGTH - len(tokens))
        return tokens + [self._filler()] * gap, [1] * len(tokens) + [0] * gap, labels + [IGNORED] * gap

    def _filler(self) -> int:
        # Padding gets neither attention nor loss, so any token serves.
        return self.tokenizer.pad_token_id or 0


def load(folder: Path) -> PreTrainedModel:
    """Load the frozen model."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.requires_grad_(False)


@torch.no_grad()
def loss_on(model: nn.Module, batches: Sequence[Batch], desc: str) -> float:
    """Return the mean loss over batches."""
    model.eval()
    return statistics.mean(model(**batch).loss.item() for batch in tqdm(batches, desc=desc, unit="batch"))


def answers_of(model: PreTrainedModel, writer: Writer, functions: Sequence[Function], tokens: int) -> list[str]:
    """Return the model's answer for each function."""
    model.eval()
    return [writer.answer(model, function, tokens) for function in functions]


def train(
    model: nn.Module, batches: Sequence[Batch], optimizer: torch.optim.Optimizer, schedule: MovingBlocks
) -> tuple[list[float], list[float]]:
    """Take one step per batch and return the loss and the seconds of each; the first one compiles."""
    rates = get_linear_schedule_with_warmup(optimizer, max(1, len(batches) // 10), len(batches))
    model.train()
    losses: list[float] = []
    seconds: list[float] = []
    with tqdm(batches, desc="training", unit="step") as bar:
        for batch in bar:
            started = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            if not seconds:
                for group in optimizer.param_groups:
                    assert all(bool(blocks.grad.any()) for blocks in group["params"]), "some blocks get no gradient"
            optimizer.step()
            schedule.step()
            rates.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            losses.append(loss.item())
            assert math.isfinite(losses[-1]), f"the loss is {losses[-1]} at step {len(losses)}"
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, seconds


def against_the_floor(model: PreTrainedModel, floor: PreTrainedModel, batches: Sequence[Batch], inner: str) -> float:
    """Return the time of our forward and backward pass over that of the frozen model, medians of turns.

    The frozen model's backward pass goes down to its embeddings. Both are compiled layer by layer.
    """
    # As compile_layers does for ours: each layer's cache would need a graph of its own.
    floor.config.use_cache = False
    for layer in layers_of(floor):
        layer.compile(backend=inner)
    model.train()
    floor.train()

    def frozen(batch: Batch) -> None:
        inputs = floor.get_input_embeddings()(batch["input_ids"]).requires_grad_(True)
        floor(inputs_embeds=inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()

    def ours(batch: Batch) -> None:
        model(**batch).loss.backward()

    frozen(batches[0])
    times = [(_seconds(ours, batch), _seconds(frozen, batch)) for batch in tqdm(batches, desc="timing", unit="pair")]
    model.zero_grad()
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return mine / theirs


def _seconds(work: Callable[[Batch], None], batch: Batch) -> float:
    started = time.perf_counter()
    work(batch)
    return time.perf_counter() - started


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model of the Llama architecture or one with the same names."""
    layers: nn.ModuleList = model.model.layers
    return layers


def megabytes(size: int) -> str:
    """Return `size` bytes as text in MiB."""
    return f"{size / 2**20:.1f} MiB"


def run(settings: Settings, folder: Path, out: Path, console: Console) -> None:
    """Load, trace, compile, train, save, load again, and report."""
    started = time.perf_counter()
    train_functions, held_out = split_by_package(collect_functions(), held_out=1 / 6, seed=0)
    writer = Writer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    train_functions, held_out = writer.short_ones(train_functions), writer.short_ones(held_out)[: settings.held_out]
    asked = held_out[: settings.questions]
    model = load(folder)
    console.print(
        f"{len(train_functions)} functions of Python's standard library to train on, {len(held_out)} of other modules "
        "held out.",
        highlight=False,
    )
    batches = writer.batches(train_functions[: settings.steps * BATCH])
    tests = writer.batches(held_out)
    loss_before = loss_on(model, tests, "held-out loss, before")
    before = answers_of(model, writer, asked, settings.answer_tokens)

    trace_started = time.perf_counter()
    masks = sylva_compile.trace_and_mask(
        model,
        batches,
        sparsity=settings.sparsity,
        block_size=settings.block_size,
        score="gain",
        num_samples=settings.traced,
    )
    trace_seconds = time.perf_counter() - trace_started
    backend = sylva_compile.backend(masks, inner=settings.inner)  # type: ignore[arg-type]
    sylva_compile.compile_layers(model, backend)
    optimizer = Muon(masks.parameters(), lr=settings.learning_rate, momentum=0.8)
    schedule = MovingBlocks(masks, every=settings.every)
    losses, seconds = train(model, batches, optimizer, schedule)
    report = backend.report()
    assert report.rewritten == len(report) == len(masks), report

    loss_after = loss_on(model, tests, "held-out loss, after")
    after = answers_of(model, writer, asked, settings.answer_tokens)
    base = load(folder)
    out.mkdir(parents=True, exist_ok=True)
    adapter = out / "adapter"
    sylva_compile.save_adapter(model, adapter)
    log = [{"step": 1 + at, "loss": loss} for at, loss in enumerate(losses)]
    log += [{"step": 0, "eval_loss": loss_before}, {"step": len(losses), "eval_loss": loss_after}]
    history = history_of(log)
    write_report(out / "report.html", changes_of(model), title=TITLE, settings=masks.config, history=history)
    # Parameters, since a state dict names the tied head twice.
    whole = sum(value.numel() * value.element_size() for value in base.parameters())
    share = sum(mask.trainable for mask in masks.values()) / sum(value.numel() for value in base.parameters())
    floor = against_the_floor(model, base, batches[: settings.timed], settings.inner)
    del base
    fresh = load(folder)
    sylva_compile.load_adapter(fresh, adapter)
    again = answers_of(fresh, writer, asked, settings.answer_tokens)
    assert again == after, "the adapter on a fresh base answers something else"

    for function, *said in zip(asked, before, after, strict=True):
        console.print(_question(function, *said))
    table = Table(title=TITLE, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("held-out loss, before", f"{loss_before:.3f}")
    table.add_row("held-out loss, after", f"[bold]{loss_after:.3f}[/bold]", end_section=True)
    table.add_row("trained at any time, of all weights", f"{share:.1%}")
    table.add_row("weight gradients rewritten", f"{report.rewritten} of {len(report)}")
    table.add_row("moves of the blocks", f"{len(seconds) // settings.every}")
    table.add_row("adapter, all places that were trained", megabytes(sum(f.stat().st_size for f in adapter.iterdir())))
    table.add_row("full checkpoint", megabytes(whole), end_section=True)
    table.add_row("time of a step, median", f"{statistics.median(seconds):.2f} s")
    table.add_row("forward and backward, of the frozen model's time", f"{floor:.2f}")
    table.add_row("time to trace and choose blocks", f"{trace_seconds:.0f} s")
    table.add_row("time of the first step, with compiling", f"{seconds[0]:.0f} s")
    table.add_row("time in all", f"{time.perf_counter() - started:.0f} s")
    console.print(table)
    console.print(
        f"Loaded onto a fresh base, the adapter gives the same answers. Adapter: {adapter}; page about the changes: "
        f"{out / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


def _question(function: Function, before: str, after: str) -> Table:
    table = Table(title=f"{function.signature} of {function.module}", show_header=False, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for who, text in (("its docstring", function.docstring), ("before", before), ("after", after)):
        # Answers hold square brackets, which rich would take for markup.
        table.add_row(who, text.replace("[", r"\["))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo with the arguments `argv`, or those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--model", type=Path, help="folder of another model that chats, of the Llama architecture")
    parser.add_argument("--steps", type=int, help=f"training steps ({Settings.steps})")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, and no effect to speak of")
    options = parser.parse_args(argv)
    settings = SMALL if options.small else Settings()
    if options.steps is not None:
        if options.steps < 1:
            parser.error(f"--steps {options.steps}: take at least one step")
        settings = replace(settings, steps=options.steps)
    transformers_logging.set_verbosity_error()
    console = Console()
    try:
        with console.status("reading the model"):
            folder = options.model or smollm2(Path("out/smollm2"))
    except NotInstalledError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(0)
    run(settings, folder, options.out, console)


if __name__ == "__main__":
    main()
