"""One pre-training: the data, the model, the methods and the loop."""

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import sylva_compile
from benchmarks.quality.tasks.base import without_dropout
from benchmarks.quality.tasks.small_gpt2 import Recipe, gather, train_tokenizer, warm_and_cool
from benchmarks.report import machine
from sylva_compile.schedules import MaskChange


@dataclass(frozen=True)
class Method:
    """How a line of the table trains.

    Attributes:
        n, m: the pattern of the weights; m = 0: dense.
        double: whether the input gradient has a second mask, as SLoPe does it.
        adapters: the share of the steps, at the end, in which low-rank adapters train as well; 0: none.
        rank: of the adapters; those of METHODS get theirs by the width of the model.
        adapter_rate: the learning rate that adapters begin with; None: that of the weights.
    """

    n: int = 0
    m: int = 0
    double: bool = True
    adapters: float = 0.0
    rank: int = 0
    adapter_rate: float | None = None

    def begin(self, steps: int) -> int:
        """Return after how many of `steps` steps the adapters come; all of them where there are none."""
        return steps - round(self.adapters * steps)


METHODS = {
    "dense": Method(),
    "static 2:4": Method(2, 4, double=False),
    "SLoPe 2:4": Method(2, 4),
    "SLoPe 2:4, adapters in the last 1%": Method(2, 4, adapters=0.01),
    "SLoPe 2:4, adapters in the last 10%": Method(2, 4, adapters=0.1),
    "SLoPe 1:4": Method(1, 4),
    "SLoPe 1:4, adapters in the last 1%": Method(1, 4, adapters=0.01),
    "SLoPe 1:4, adapters in the last 10%": Method(1, 4, adapters=0.1),
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


class Training:
    """A model while it is pre-trained, and all that the rest of its training depends on.

    Attributes:
        at: the number of steps so far.
    """

    def __init__(self, text: Text, sizes: Sizes, method: Method, learning_rate: float, seed: int) -> None:
        """Make the model and its optimizer, as `pretrain` describes them."""
        self.text, self.sizes, self.method, self.learning_rate = text, sizes, method, learning_rate
        self.model = new_model(text, sizes, seed)
        self.schedule = None
        if method.m:
            masks = sylva_compile.prune_masks(self.model, method.n, method.m, double=method.double)
            masks.embed()
            self.schedule = MaskChange(masks, every=sizes.change)
        self.optimizer = torch.optim.AdamW(groups_of(self.model, learning_rate, sizes.others), weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.at, self.curve, self.seconds = 0, list[list[float]](), 0.0

    def advance(self, to: int, say: Callable[[str], None]) -> None:
        """Train until step `to`, or until the loss of the curve is not finite."""
        started = time.perf_counter() - self.seconds
        while self.at < to and all(math.isfinite(loss) for _, loss in self.curve[-1:]):
            self._step()
            self.seconds = time.perf_counter() - started
            if self.at % self.sizes.evaluate == 0:
                self.curve.append([self.at, held_out_loss(self.model, self.text.validation)])
                self.seconds = time.perf_counter() - started
                say(f"step {self.at} of {self.sizes.steps}: {self.curve[-1][1]:.3f}, {self.seconds:.0f} s")

    def _step(self) -> None:
        sizes, model = self.sizes, self.model
        if len(self.order) < sizes.recipe.batch:
            self.order = torch.randperm(len(self.text.train), generator=self.generator)
        chosen, self.order = self.order[: sizes.recipe.batch], self.order[sizes.recipe.batch :]
        batch = self.text.train[chosen]
        of_weights, of_others, *of_adapters = self.optimizer.param_groups
        for group in (of_weights, of_others):
            group["lr"] = group["peak"] * warm_and_cool(self.at, sizes.steps)
        for group in of_adapters:
            group["lr"] = group["peak"] * (sizes.steps - self.at) / (sizes.steps - self.method.begin(sizes.steps))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        if self.at == 0:
            check_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.at += 1

    def add_adapters(self) -> None:
        """Let low-rank adapters train as well from here."""
        added = sylva_compile.add_low_rank(self.model, self.method.rank, generator=self.generator)
        rate = self.learning_rate if self.method.adapter_rate is None else self.method.adapter_rate
        self.optimizer.add_param_group({"params": added, "peak": rate})

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as long as there are no adapters."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "order": self.order.clone(),
            "at": self.at,
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made, by the same method, learning rate and seed."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.order, self.at, self.curve, self.seconds = (state[name] for name in ("order", "at", "curve", "seconds"))

    def result(self) -> dict[str, Any]:
        """Return the losses, and fold the adapters, if there are any."""
        found = {
            "curve": self.curve,
            "validation": held_out_loss(self.model, self.text.validation),
            "test": held_out_loss(self.model, self.text.test),
            "seconds": self.seconds,
        }
        if self.method.adapters:
            sylva_compile.fold_low_rank(self.model)
            found["test, folded"] = held_out_loss(self.model, self.text.test)
        return found


def pretrain(
    text: Text,
    sizes: Sizes,
    method: Method,
    learning_rate: float,
    seed: int,
    say: Callable[[str], None] = print,
    states: Path | None = None,
) -> dict[str, Any]:
    """Train a new model; return its losses, of the curve and of the end.

    AdamW with a decay of 0.01 and clipped gradients; a linear warm-up over a twentieth of the steps, then half a
    cosine. Adapters begin at their full rate, which falls to zero in a line: by what is left of the cosine, they would
    not change the loss in its third digit. The seed draws the weights, the order of the sequences and the adapters.

    Until its adapters come, a run is the one without them. So runs leave their state in the folder `states` at the
    steps where adapters of METHODS begin, and a run with adapters goes on from there.
    """
    training = Training(text, sizes, method, learning_rate, seed)
    begin = method.begin(sizes.steps)
    if states is not None:
        trunk = replace(method, adapters=0.0, rank=0, adapter_rate=None)
        tokens = hashlib.sha256(text.train.numpy().tobytes()).hexdigest()
        # With the commit and the versions in its name, a state of other code is never gone on with.
        run = repr((sizes, trunk, learning_rate, seed, tokens, machine()))
        folder = states / hashlib.sha256(run.encode()).hexdigest()[:16]
        late = {each.begin(sizes.steps) for each in METHODS.values() if replace(each, adapters=0.0) == trunk}
        stops = sorted(stop for stop in late if stop <= begin and stop < sizes.steps)
        if kept := [stop for stop in stops if method.adapters and (folder / f"{stop}.pt").exists()]:
            training.load_state_dict(torch.load(folder / f"{kept[-1]}.pt"))
            say(f"on from step {training.at}")
        for stop in stops:
            if stop > training.at:
                training.advance(stop, say)
                write_state(training.state_dict(), folder / f"{stop}.pt")
    training.advance(begin, say)
    if method.adapters:
        training.add_adapters()
        training.advance(sizes.steps, say)
    return training.result()


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write the state of a training beside its file, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(state, unfinished)
    unfinished.replace(path)


def check_gradients(model: torch.nn.Module) -> None:
    """Assert that the first backward pass reached every parameter."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), f"{name} has no gradient"
