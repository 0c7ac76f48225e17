"""Checkpoints of tiny language models with a tokenizer, and files of sentences to train them on."""

import csv
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    f"The {kind} {place} near the {where} is {how}."
    for kind in ("cheap", "quiet", "famous", "old")
    for place in ("pub", "restaurant", "coffee shop")
    for where in ("river", "station")
    for how in ("good", "closed")
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 320 tokens at most, trained on the sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    if chat:
        made.chat_template = CHAT
    return made


def save_tiny_model(folder: Path, kind: str = "llama", *, chat: bool = False) -> Path:
    """Write a model of `kind`, "llama" or "gpt2", with its tokenizer to `folder`, and return it."""
    make_tokenizer(chat=chat).save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=0.1,
            **ends,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_table(path: Path) -> Path:
    """Write the sentences as a CSV or TSV file with the columns number and text."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["number", "text"])
        writer.writerows(enumerate(SENTENCES))
    return path
