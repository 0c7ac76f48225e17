"""Questions with texts as choices; the model's answer is the text with the highest mean log-likelihood of its tokens.

All texts stand in one sequence behind the question. None of them sees another, and each starts at the same position, so
that their likelihoods are those of four sequences, and the question is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.tasks.base import Batch, Examples, device_of, on
from benchmarks.quality.tasks.generation import padded

_QUESTION, _PADDING = -1, -2


@dataclass(frozen=True)
class Answers(Examples):
    """Token ids of questions and of their choices.

    Attributes:
        questions: the token ids of every question.
        choices: the token ids of every question's choices, without those of the question.
        answers: the index of the right choice of every question.
        padding: the token that pads batches.
    """

    questions: Sequence[list[int]]
    choices: Sequence[Sequence[list[int]]]
    answers: Sequence[int]
    padding: int

    def lengths(self) -> Sequence[int]:
        """Return the number of tokens of every question with all of its choices."""
        return [len(asked) + sum(map(len, texts)) for asked, texts in zip(self.questions, self.choices, strict=True)]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Return a batch of questions, each with its choices in one sequence of at most S tokens.

        `input_ids`, `position_ids`, `choice` (the index of a token's choice, or less than 0) and `before` (the place of
        the token that predicts this one) are `[B, S]`, `attention_mask` (0, or the lowest value where a token does not
        see another) is `[B, 1, S, S]`, and `answers` `[B]`.
        """
        rows = [_laid_out(self.questions[at], self.choices[at]) for at in chosen]
        ids, position, choice, before = (
            padded(part, filling)[0]
            for part, filling in zip(zip(*rows, strict=True), (self.padding, 0, _PADDING, 0), strict=True)
        )
        places = torch.arange(ids.shape[1])
        same = (choice[:, None, :] == _QUESTION) | (choice[:, :, None] == choice[:, None, :])
        seen = same & (places[:, None] >= places)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {
            "input_ids": ids,
            "position_ids": position,
            "attention_mask": mask[:, None],
            "choice": choice,
            "before": before,
            "answers": torch.tensor([self.answers[at] for at in chosen]),
        }


def _laid_out(asked: list[int], texts: Sequence[list[int]]) -> tuple[list[int], ...]:
    """Return the tokens, their positions, their choices and the places of the tokens before them."""
    ids, position = list(asked), list(range(len(asked)))
    choice, before = [_QUESTION] * len(asked), [0] * len(asked)
    for number, text in enumerate(texts):
        before += [len(asked) - 1, *range(len(ids), len(ids) + len(text) - 1)]
        ids += text
        position += range(len(asked), len(asked) + len(text))
        choice += [number] * len(text)
    return ids, position, choice, before


def mean_log_likelihoods(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean log-likelihood of every choice's tokens `[B, C]`, from logits `[B, S, V]`."""
    before, row = batch["before"], torch.arange(len(logits), device=logits.device)[:, None]
    each = logits[row, before, batch["input_ids"]].float() - logits.float().logsumexp(-1)[row, before]
    # Column 0 is of all tokens that are in no choice.
    carries = nn.functional.one_hot(batch["choice"].clamp(min=-1) + 1)[..., 1:].float()
    return torch.einsum("bs,bsc->bc", each, carries) / carries.sum(1)


@torch.no_grad()
def evaluate_answers(model: nn.Module, part: Answers, size: int) -> dict[str, Any]:
    """Return the share of questions answered correctly, and the mean loss per token of the right answers."""
    model.eval()
    right, loss = 0, 0.0
    for batch in part.batches(size):
        batch = on(device_of(model), batch)
        asked = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
        found = mean_log_likelihoods(model(**asked).logits, batch)
        right += int((found.argmax(1) == batch["answers"]).sum())
        loss -= found.gather(1, batch["answers"][:, None]).sum().item()
    return {"metric": right / len(part), "loss": loss / len(part)}
