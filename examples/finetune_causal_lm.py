"""Fine-tune a few blocks of a causal language model with Hugging Face's Trainer: the library's calls in one script.

    python examples/finetune_causal_lm.py --model path/to/model --data path/to/text.csv --column text

It trains on a column of a CSV file and writes an adapter. With `torchrun --nproc-per-node 2` in place of
`python`, two processes train it together. The command line `sylva-compile finetune` does the same with many more
options, other kinds of data, and runs that can be interrupted.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import sylva_compile
from sylva_compile.optim import Muon


def read_examples(
    path: Path, column: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[dict[str, list[int]]]:
    """Return one example per row of a CSV file, cut short or padded to `length`; padding carries no loss."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        texts = [row[column] + (tokenizer.eos_token or "") for row in csv.DictReader(file)]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = tokenizer(texts, max_length=length, truncation=True, padding="max_length")
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": [t if m else -100 for t, m in zip(ids, mask, strict=True)]}
        for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune with the arguments `argv`, or those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="CSV file")
    parser.add_argument("--column", required=True, help="column with texts")
    parser.add_argument("--out", type=Path, default=Path("out/adapter"), help="folder for the adapter (%(default)s)")
    parser.add_argument("--steps", type=int, default=-1, help="number of steps (one pass over the data)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a step (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=0.95, help="share of the blocks that stays frozen")
    parser.add_argument("--block-size", type=int, default=64, help="rows and columns of a block (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="frozen weights in bfloat16; blocks stay float32")
    parser.add_argument("--inner", default="inductor", help="compiler; aot_eager is for debugging (%(default)s)")
    options = parser.parse_args(argv)
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # An adapter fits a base of the dtype that it was trained in, so none is left to the files.
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).requires_grad_(False)
    examples = read_examples(options.data, options.column, tokenizer, length=options.length)
    arguments = TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=1,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        # A smaller last batch would make the compiler compile a second graph.
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        # Without this, processes that have no accelerator do not find each other.
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        report_to="none",
    )
    model.to(arguments.device)

    # Each process traces sequences of its own, and all get the same masks.
    group = dist.group.WORLD if dist.is_initialized() else None
    mine = examples[arguments.process_index :: arguments.world_size]
    loader = DataLoader(mine, options.batch_size, shuffle=True, drop_last=True, collate_fn=default_data_collator)
    masks = sylva_compile.trace_and_mask(
        model,
        loader,
        sparsity=options.sparsity,
        block_size=options.block_size,
        num_samples=256,
        process_group=group,
    )
    masks.embed(model)
    # In place, because Trainer(torch.compile(model)) drops columns of the data and prefixes checkpoint keys.
    backend = sylva_compile.backend(masks, inner=options.inner)
    sylva_compile.compile_layers(model, backend)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=default_data_collator,
        optimizers=(Muon(masks.parameters(), lr=options.lr, momentum=0.8), None),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        sylva_compile.save_adapter(model, options.out)
        print(f"{backend.report().rewritten} of {len(masks)} weight gradients rewritten; adapter: {options.out}")


if __name__ == "__main__":
    main()
