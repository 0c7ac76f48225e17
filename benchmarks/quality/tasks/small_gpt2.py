"""A small GPT-2 with a byte-level tokeniser, pre-trained on English text that every machine with this project has.

The text is the documentation inside Python's standard library and the training sentences of SST-2 and CoLA. Models are
kept in out/pretrained/, so that all methods and seeds start from the same one. They have seen a millionth of GPT-2's
text: they know something of spelling, grammar and names, and little else.
"""

import ast
import hashlib
import json
import math
import platform
import random
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.quality.tasks.base import without_dropout
from benchmarks.quality.tasks.classification import COLA, SST2

CACHE = Path(__file__).resolve().parents[3] / "out" / "pretrained"
END = "<|endoftext|>"
PADDING = "<|padding|>"


@dataclass(frozen=True)
class Recipe:
    """The sizes and the pre-training of a model.

    Attributes:
        layers, heads, width, positions: the sizes of the model.
        vocabulary: the number of tokens; 258 of them are the bytes, the end of a text, and padding.
        characters: the length of the pre-training text; 0: random weights, and bytes as tokens.
        epochs, batch, learning_rate: the pre-training, on sequences half as long as `positions`.
    """

    layers: int = 4
    heads: int = 4
    width: int = 192
    positions: int = 256
    vocabulary: int = 2048
    characters: int = 3_000_000
    epochs: int = 3
    batch: int = 8
    learning_rate: float = 2e-3


RECIPES = {
    "small-gpt2": Recipe(),
    "tiny": Recipe(layers=2, heads=2, width=32, positions=1024, vocabulary=258, characters=0),
}


def pretrained(name: str, data: Path) -> Path:
    """Return the folder of a model and its tokeniser; make it now if it does not exist.

    Args:
        name: a name in `RECIPES`.
        data: the folder of the data sets whose sentences the text takes.
    """
    recipe = RECIPES[name]
    said = [json.dumps(asdict(recipe), sort_keys=True).encode()]
    if recipe.characters:
        said += [platform.python_version().encode(), *(task.file(data).read_bytes() for task in (SST2, COLA))]
    folder = CACHE / f"{name}-{hashlib.sha256(b''.join(said)).hexdigest()[:12]}"
    if not folder.exists():
        text = gather(data, recipe.characters) if recipe.characters else []
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=CACHE))
        tokenizer = train_tokenizer(text, recipe.vocabulary)
        tokenizer.save_pretrained(beside)
        pretrain(recipe, tokenizer, text).save_pretrained(beside)
        (beside / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        try:
            beside.rename(folder)
        except OSError:
            # Another process was first; use its model.
            shutil.rmtree(beside)
    return folder


def gather(data: Path, characters: int) -> list[str]:
    """Return texts of the standard library's documentation and of SST-2 and CoLA, shuffled in a fixed order."""
    texts = sorted(set(_documentation(Path(sysconfig.get_path("stdlib")))))
    for task in (SST2, COLA):
        sentences = [sentence for sentence, label in task.read(task.file(data))]
        # About as long as a docstring.
        texts += [" ".join(sentences[at : at + 8]) for at in range(0, len(sentences), 8)]
    random.Random(0).shuffle(texts)
    taken, total = 0, 0
    while taken < len(texts) and total < characters:
        total += len(texts[taken])
        taken += 1
    return texts[:taken]


def _documentation(library: Path) -> Iterator[str]:
    """Yield the docstrings of at least ten words in a library."""
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(path.parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            # The library keeps files with errors, to test that Python refuses them.
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= 10:
                    yield text


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokeniser, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PADDING)


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> GPT2LMHeadModel:
    """Make a new model and train it to continue the texts, if there are any."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(without_dropout(config))
    if not texts:
        return model
    ids = [token for each in tokenizer(list(texts))["input_ids"] for token in (*each, tokenizer.eos_token_id)]
    length = recipe.positions // 2
    sequences = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    steps = recipe.epochs * (len(sequences) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: warm_and_cool(at, steps))
    started = time.monotonic()
    for at in range(steps):
        if at % (steps // recipe.epochs) == 0:
            order = torch.randperm(len(sequences))
        start = at % (steps // recipe.epochs) * recipe.batch
        # Random offsets train all positions, so that prompts may be longer than the sequences here.
        shift = int(torch.randint(0, recipe.positions - length + 1, ()))
        batch = sequences[order[start : start + recipe.batch]]
        positions = torch.arange(shift, shift + length).expand(len(batch), -1)
        loss = model(input_ids=batch, position_ids=positions, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if at % 100 == 0 or at == steps - 1:
            print(
                f"pre-training, step {at + 1} of {steps}: loss {loss.item():.2f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model


def warm_and_cool(at: int, steps: int) -> float:
    """Return the factor of the learning rate in step `at`: up for a twentieth of the steps, then half a cosine."""
    warm = max(1, steps // 20)
    return (at + 1) / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / (steps - warm)))
