"""Fine-tune a causal language model from a local folder on a text or CSV file, with Hugging Face's Trainer.

The script trains only the blocks that second-order information picks, and writes them as an adapter at the end.

    python examples/finetune_causal_lm.py --model path/to/model --data notes.txt
    python examples/finetune_causal_lm.py --model path/to/model --data reviews.csv --column text --bf16

A text file is cut into sequences of `--max-length` tokens; in a CSV or TSV file, each row's column is one sequence.
"""

import argparse
import csv
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import sylva_compile
from sylva_compile.config import add_arguments

SETTINGS = ("sparsity", "block_size", "method", "score", "num_samples")
"""Settings of the trace that the command line offers, with the help texts of SylvaConfig."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
IGNORED = -100
"""Label of positions without loss, as in transformers."""


class InputError(ValueError):
    """The user's input cannot be used; the message is one line and says what to do."""


def load_model(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer and the model of `folder`, with all weights frozen.

    Raises:
        InputError: `folder` holds no causal language model with a tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {folder} holds no config.json; give a folder written by save_pretrained.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model {folder} holds no causal language model with a tokenizer: {reason}") from error
    return tokenizer, model.requires_grad_(False)


def read_texts(path: Path, column: str | None) -> list[str]:
    """Return the non-empty texts of one column of a CSV or TSV file, or any other file as a single text.

    Raises:
        InputError: there is no such file or column, or the file is not readable as UTF-8 or as a table.
    """
    if not path.is_file():
        raise InputError(f"--data {path} is no file; give a text, CSV or TSV file.")
    separator = SEPARATORS.get(path.suffix.lower())
    if separator is None and column is not None:
        raise InputError(f"--column {column}: {path} is no .csv or .tsv file; rename it, or leave --column out.")
    try:
        if separator is None:
            return [path.read_text(encoding="utf-8")]
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=separator)
            columns = list(table.fieldnames or [])
            if not columns:
                raise InputError(f"--data {path} is empty; give a table with a first line of column names.")
            if column not in columns:
                found = f"no column {column!r}" if column else "several columns"
                raise InputError(f"--data {path} has {found}; choose --column from {', '.join(columns)}.")
            return [text for row in table if (text := (row[column] or "").strip())]
    except UnicodeDecodeError:
        raise InputError(f"--data {path} is not UTF-8; convert it first.") from None
    except csv.Error as error:
        raise InputError(f"--data {path} is no table: {error}; mend it, or rename it to .txt.") from None


def cut_into_sequences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, *, rows: bool
) -> Dataset:
    """Return sequences of one length L, so that the compiler sees a single shape.

    Args:
        texts: rows, or texts to be cut.
        tokenizer: the model's own.
        max_length: L at most; L is less if every row is shorter.
        rows: True makes one sequence of each text, cut short or padded; False joins all texts and cuts them into
            sequences of `max_length`, without the remainder.

    Returns:
        A data set with the columns input_ids, attention_mask and labels, each `[L]`.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [tokenizer(text, verbose=False)["input_ids"] + end for text in texts]
    if rows:
        sequences = [sequence[:max_length] for sequence in tokens]
        max_length = max(map(len, sequences), default=max_length)
    else:
        joined = list(itertools.chain.from_iterable(tokens))
        whole = len(joined) // max_length * max_length
        sequences = [joined[start : start + max_length] for start in range(0, whole, max_length)]
    # Padding gets neither attention nor loss, so any token serves where the tokenizer defines none for padding.
    filler = tokenizer.pad_token_id or 0
    missing = [max_length - len(sequence) for sequence in sequences]
    return Dataset.from_dict(
        {
            "input_ids": [s + [filler] * gap for s, gap in zip(sequences, missing, strict=True)],
            "attention_mask": [[1] * len(s) + [0] * gap for s, gap in zip(sequences, missing, strict=True)],
            "labels": [s + [IGNORED] * gap for s, gap in zip(sequences, missing, strict=True)],
        }
    )


def hold_out(sequences: Dataset, batch_size: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split into training and held-out sequences; about a tenth is held out, in whole batches.

    Raises:
        InputError: there are too few sequences for a training batch beside the held-out ones.
    """
    held_out = max(1, round(len(sequences) / 10 / batch_size)) * batch_size
    if len(sequences) < held_out + batch_size:
        raise InputError(
            f"--data gives {len(sequences)} sequences, and training and testing need {held_out + batch_size}; "
            "give a larger file, or lower --batch-size or --max-length."
        )
    halves = sequences.train_test_split(test_size=held_out, seed=seed)
    return halves["train"], halves["test"]


def scope_of(names: Sequence[str]) -> str | list[str]:
    """Return `names` in a form that `trace_and_mask` accepts.

    A single name that holds other characters than a module's name is "all-linear" or a regular expression; other names
    are endings of module names.
    """
    return list(names) if len(names) > 1 or re.fullmatch(r"[\w.]+", names[0]) else names[0]


def run(options: argparse.Namespace) -> None:
    """Load, trace, embed, compile, train, save."""
    set_seed(options.seed)
    settings = {name: getattr(options, name) for name in SETTINGS}
    config = sylva_compile.SylvaConfig(scope=scope_of(options.scope), **settings)
    texts = read_texts(options.data, options.column)
    tokenizer, model = load_model(options.model, torch.bfloat16 if options.bf16 else torch.float32)
    sequences = cut_into_sequences(texts, tokenizer, options.max_length, rows=options.column is not None)
    train, held_out = hold_out(sequences, options.batch_size, options.seed)
    try:
        # A folder that cannot be made must not come to light after the training.
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out} cannot be made ({error}); give a folder of yours.") from error
    print(f"{len(train)} sequences of {len(train[0]['input_ids'])} tokens to train on, {len(held_out)} held out.")

    arguments = TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        # A smaller last batch would make the compiler compile a second graph.
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    model.to(arguments.device)
    loader = DataLoader(
        train, batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator
    )
    masks = sylva_compile.trace_and_mask(model, loader, config)
    masks.embed(model)
    if options.gradient_checkpointing:
        # A release of transformers 5 renamed the method. Reentrant checkpointing needs an input that requires grad, and
        # the frozen embeddings give none.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    backend = sylva_compile.backend(masks, inner=options.inner)
    # In place, because Trainer(torch.compile(model)) drops columns of the data and prefixes checkpoint keys.
    sylva_compile.compile_layers(model, backend)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        optimizers=(sylva_compile.AdamW(masks.parameters(), lr=options.lr), None),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    sylva_compile.save_adapter(model, options.out)

    report = backend.report()
    trained = sum(parameter.numel() for parameter in masks.parameters())
    print(f"{report.rewritten} of {len(report)} weight gradients rewritten, {trained:,} elements trained.")
    for when, loss in (("before", before), ("after", after)):
        print(f"held-out loss {when}: {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    print(f"adapter: {options.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune with the arguments `argv`, or those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder with a causal language model and tokenizer")
    add("--data", type=Path, required=True, metavar="FILE", help="text, CSV or TSV file")
    add("--column", help="column of a CSV or TSV file")
    add("--out", type=Path, default=Path("out/adapter"), help="folder for the adapter (%(default)s)")
    add_arguments(parser, SETTINGS, num_samples=256)
    help_of_scope = "all-linear, endings of module names, or a regular expression for whole names (all-linear)"
    add("--scope", nargs="+", default=["all-linear"], metavar="NAME", help=help_of_scope)
    add("--epochs", type=float, default=1.0, help="passes over the data (%(default)s)")
    add("--steps", type=int, default=-1, help="number of steps; it overrides --epochs")
    add("--lr", type=float, default=2e-4, help="learning rate (%(default)s)")
    add("--batch-size", type=int, default=8, help="sequences in a step (%(default)s)")
    add("--max-length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    add("--bf16", action="store_true", help="frozen weights in bfloat16; the trained blocks stay float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    inners = ["inductor", "aot_eager"]
    add("--inner", default="inductor", choices=inners, help="compiler; aot_eager is for debugging (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random choices (%(default)s)")
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_length", "epochs", "lr"):
        if getattr(options, name) <= 0:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be above 0.")
    try:
        run(options)
    except (InputError, sylva_compile.SylvaError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
