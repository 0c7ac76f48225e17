"""One pre-training: the data, the model, the methods and the loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import sylva_compile
from benchmarks.quality.tasks.base import without_dropout
from benchmarks.quality.tasks.small_gpt2 import Recipe, gather, train_tokenizer, warm_and_cool
from sylva_compile.schedules import MaskChange


@dataclass(frozen=True)
class Method:
    """How a line of the table trains.

    Attributes:
        n, m: the pattern of the weights; m = 0: dense.
        double: whether the input gradient has a second mask, as SLoPe does it.
        adapters: the share of the steps, at the end, in which low-rank adapters train as well; 0: none.
        rank: of the adapters; those of METHODS get theirs by the width of the model.
    """

    n: int = 0
    m: int = 0
    double: bool = True
    adapters: float = 0.0
    rank: int = 0


METHODS = {
    "dense": Method(),
    "static 2:4": Method(2, 4, double=False),
    "SLoPe 2:4": Method(2, 4),
    "SLoPe 2:4, adapters in the last 1%": Method(2, 4, adapters=0.01),
    "SLoPe 2:4, adapters in the last 10%": Method(2, 4, adapters=0.1),
}


@dataclass(frozen=True)
class Sizes:
    """The model's sizes, as a recipe, and how it trains.

    Attributes:
        recipe: the sizes of the model and of its text.
        steps, length: optimizer steps, and tokens of a sequence.
        held_out: sequences of the validation part, and as many of the test part.
        change: steps from one choice of the second masks to the next.
        evaluate: steps from one held-out loss of the curve to the next.
        others: the learning rate of embeddings, norms and biases, which no method prunes; None: that of the weights.
    """

    recipe: Recipe = field(default_factory=Recipe)
    steps: int = 600
    length: int = 128
    held_out: int = 128
    change: int = 50
    evaluate: int = 50
    others: float | None = None


@dataclass(frozen=True)
class Text:
    """Sequences of tokens, `int64[count, length]` each."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def read_text(data: Path, sizes: Sizes) -> Text:
    """Gather the text that small-gpt2 is pre-trained on, and keep its last sequences for validation and test."""
    texts = gather(data, sizes.recipe.characters)
    tokenizer = train_tokenizer(texts, sizes.recipe.vocabulary)
    ids = [token for each in tokenizer(list(texts))["input_ids"] for token in (*each, tokenizer.eos_token_id)]
    sequences = torch.tensor(ids[: len(ids) // sizes.length * sizes.length]).view(-1, sizes.length)
    held = sizes.held_out
    return Text(sequences[: -2 * held], sequences[-2 * held : -held], sequences[-held:], len(tokenizer))


def new_model(text: Text, sizes: Sizes, seed: int) -> GPT2LMHeadModel:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    recipe = sizes.recipe
    config = GPT2Config(
        vocab_size=text.vocabulary,
        n_positions=sizes.length,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    without_dropout(config)
    return GPT2LMHeadModel(config)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, sequences: Tensor) -> float:
    """Return the mean loss of a token of `sequences`."""
    model.eval()
    losses: list[float] = [
        model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in sequences.split(32)
    ]
    model.train()
    return sum(losses) / len(sequences)


def groups_of(model: GPT2LMHeadModel, learning_rate: float, others: float | None) -> list[dict[str, Any]]:
    """Divide parameters into the layers' weights, and embeddings, norms and biases.

    As `peak` the groups have the learning rates `learning_rate` and `others`; None: both the first.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    weights = [each for each in model.parameters() if each.dim() == 2 and id(each) not in embeddings]
    ids = {id(each) for each in weights}
    rest = [each for each in model.parameters() if id(each) not in ids]
    return [
        {"params": weights, "peak": learning_rate},
        {"params": rest, "peak": learning_rate if others is None else others},
    ]


def pretrain(
    text: Text, sizes: Sizes, method: Method, learning_rate: float, seed: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train a new model; return its losses, of the curve and of the end.

    AdamW with a decay of 0.01 and clipped gradients; a linear warm-up over a twentieth of the steps, then half a
    cosine. Adapters begin at the full rate, which falls to zero in a line: by what is left of the cosine, they would
    not change the loss in its third digit. The seed draws the weights, the order of the sequences and the adapters.
    """
    model = new_model(text, sizes, seed)
    schedule = None
    if method.m:
        masks = sylva_compile.prune_masks(model, method.n, method.m, double=method.double)
        masks.embed()
        schedule = MaskChange(masks, every=sizes.change)
    optimizer = torch.optim.AdamW(groups_of(model, learning_rate, sizes.others), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    begin_adapters = sizes.steps - round(method.adapters * sizes.steps)
    curve, started, order = [], time.perf_counter(), torch.empty(0, dtype=torch.int64)
    for at in range(sizes.steps):
        if method.adapters and at == begin_adapters:
            added = sylva_compile.add_low_rank(model, method.rank, generator=generator)
            optimizer.add_param_group({"params": added, "peak": learning_rate})
        if len(order) < sizes.recipe.batch:
            order = torch.randperm(len(text.train), generator=generator)
        batch, order = text.train[order[: sizes.recipe.batch]], order[sizes.recipe.batch :]
        of_weights, of_others, *of_adapters = optimizer.param_groups
        for group in (of_weights, of_others):
            group["lr"] = group["peak"] * warm_and_cool(at, sizes.steps)
        for group in of_adapters:
            group["lr"] = group["peak"] * (sizes.steps - at) / (sizes.steps - begin_adapters)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if at == 0:
            check_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        if (at + 1) % sizes.evaluate == 0:
            curve.append([at + 1, held_out_loss(model, text.validation)])
            say(f"step {at + 1} of {sizes.steps}: {curve[-1][1]:.3f}, {time.perf_counter() - started:.0f} s")
            if not math.isfinite(curve[-1][1]):
                break
    found = {
        "curve": curve,
        "validation": held_out_loss(model, text.validation),
        "test": held_out_loss(model, text.test),
        "seconds": time.perf_counter() - started,
    }
    if method.adapters:
        sylva_compile.fold_low_rank(model)
        found["test, folded"] = held_out_loss(model, text.test)
    return found


def check_gradients(model: torch.nn.Module) -> None:
    """Assert that the first backward pass reached every parameter."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), f"{name} has no gradient"
