"""Text generation: prompts, and references to train on and to compare with. Only references' tokens carry loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.base import Batch, Examples, device_of, on

IGNORED = -100
"""The label of tokens that the loss leaves out."""


@dataclass(frozen=True)
class Prompt:
    """The prompt of a model, and all answers that count as good."""

    text: str
    references: Sequence[str]


@dataclass(frozen=True)
class Writing(Examples):
    """Prompts, and an example for every reference.

    Attributes:
        prompts: distinct prompts; a model writes one text for each.
        tokenizer: the model's tokeniser.
        ids: for every example, the tokens of its prompt and of its reference, which end with the end of text.
        decoder_only: whether one sequence holds both prompt and reference.
    """

    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    ids: Sequence[tuple[list[int], list[int]]]
    decoder_only: bool

    @classmethod
    def encode(
        cls, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, length: int, *, decoder_only: bool
    ) -> "Writing":
        """Tokenise. Beyond `length` tokens, prompts lose their beginning and references their end."""
        ids = []
        for prompt in prompts:
            # With the special token that the tokeniser adds: the beginning for a Llama, the end for a T5.
            asked = tokenizer(prompt.text)["input_ids"]
            for reference in prompt.references:
                answer = tokenizer(reference, add_special_tokens=False)["input_ids"]
                # If one sequence is too short for both, a reference gets half of it, or more where the prompt is short.
                most = max(length // 2, length - len(asked)) if decoder_only else length
                answer = [*answer[: most - 1], tokenizer.eos_token_id]
                room = length - len(answer) if decoder_only else length
                ids.append((asked[max(0, len(asked) - room) :], answer))
        return cls(prompts, tokenizer, ids, decoder_only)

    def lengths(self) -> Sequence[int]:
        """Return the number of tokens of every example."""
        return [len(asked) + len(answer) for asked, answer in self.ids]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Return token ids, mask and labels, padded to the longest, `[B, S]`; encoder-decoders have labels `[B, T]`."""
        pairs = [self.ids[at] for at in chosen]
        whole = [asked + answer if self.decoder_only else asked for asked, answer in pairs]
        labels = [[IGNORED] * len(asked) + answer if self.decoder_only else answer for asked, answer in pairs]
        ids, mask = padded(whole, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask, "labels": padded(labels, IGNORED)[0]}


def padded(rows: Sequence[Sequence[int]], filling: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows to one length; return them, and a mask that is 1 outside of the padding, both `[B, S]`."""
    length = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), length), filling), torch.zeros(len(rows), length, dtype=torch.int64)
    for at, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[at, place] = torch.tensor(row, dtype=torch.int64)
        mask[at, place] = 1
    return ids, mask


@torch.no_grad()
def write(model: nn.Module, part: Writing, size: int, *, new_tokens: int) -> list[str]:
    """Return the model's text for every prompt: at each step the likeliest token, until the end of text.

    Args:
        model: the fine-tuned model.
        part: the part of the data whose prompts are used.
        size: the number of prompts in a batch; a decoder's are padded on the left.
        new_tokens: the maximum number of tokens to write.
    """
    model.eval()
    tokenizer, texts = part.tokenizer, [""] * len(part.prompts)
    asked: dict[int, list[int]] = {}
    for (ids, _), at in zip(part.ids, _owners(part.prompts), strict=True):
        asked[at] = ids
    order = sorted(asked, key=lambda at: len(asked[at]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids, mask = padded([asked[at] for at in chosen], tokenizer.pad_token_id, left=part.decoder_only)
        # Eager, since a compiler would meet a new length at every step; the weights are the same.
        with torch.compiler.set_stance("force_eager"):
            found = model.generate(
                **on(device_of(model), {"input_ids": ids, "attention_mask": mask}),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        written = found[:, ids.shape[1] :] if part.decoder_only else found
        for at, row in zip(chosen, written, strict=True):
            texts[at] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return texts


@torch.no_grad()
def token_loss(model: nn.Module, part: Writing, size: int) -> float:
    """Return the mean loss over the tokens of every prompt's first reference."""
    model.eval()
    loss, tokens = 0.0, 0
    owners = _owners(part.prompts)
    first = [ids for at, ids in enumerate(part.ids) if at == 0 or owners[at] != owners[at - 1]]
    for batch in replace(part, ids=first).batches(size):
        count = int((batch["labels"] != IGNORED).sum())
        loss += model(**on(device_of(model), batch)).loss.item() * count
        tokens += count
    return loss / tokens


Scores = Callable[[Sequence[str], Sequence[Sequence[str]]], Mapping[str, float]]
"""A call is `scores(texts, references of each text)`."""


def evaluate_writing(
    model: nn.Module, part: Writing, size: int, *, scores: Scores, metric: str, new_tokens: int
) -> dict[str, Any]:
    """Return `metric` as a fraction, the other `scores` of the model's texts, and the mean loss of first references."""
    texts = write(model, part, size, new_tokens=new_tokens)
    found = dict(scores(texts, [prompt.references for prompt in part.prompts]))
    return {"metric": found.pop(metric) / 100, "loss": token_loss(model, part, size), "further": found}


def _owners(prompts: Sequence[Prompt]) -> list[int]:
    return [at for at, prompt in enumerate(prompts) for _ in prompt.references]
