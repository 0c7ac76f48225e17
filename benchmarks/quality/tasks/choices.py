"""Multiple-choice questions; the model's answer is the choice's letter with the highest logit as next token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.base import Batch, Examples, device_of, on
from benchmarks.quality.tasks.generation import padded

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Questions(Examples):
    """Token ids of questions, each ending where the letter of the answer would follow.

    Attributes:
        ids: the token ids of every question.
        answers: the index of the right choice of every question.
        letters: the token of each letter.
        padding: the token that pads batches.
    """

    ids: Sequence[list[int]]
    answers: Sequence[int]
    letters: Sequence[int]
    padding: int

    @classmethod
    def encode(
        cls,
        rows: Sequence[Mapping[str, Any]],
        examples: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        shots: int,
        length: int,
    ) -> "Questions":
        """Put answered questions of the same subject before each question, and tokenise.

        Args:
            rows: questions with `question`, `choices`, `answer` (the index of the right choice) and `subject`.
            examples: answered questions with the same fields.
            tokenizer: the model's tokeniser.
            shots: the number of answered questions before each question.
            length: the maximum number of tokens; longer texts lose their beginning.
        """
        shown: dict[str, list[str]] = {}
        for row in examples:
            shown.setdefault(row["subject"], []).append(f"{asked(row)} {LETTERS[row['answer']]}")
        ids = []
        for row in rows:
            subject = row["subject"].replace("_", " ")
            title = f"The following are multiple choice questions (with answers) about {subject}."
            text = "\n\n".join([title, *shown.get(row["subject"], [])[:shots], asked(row)])
            ids.append(tokenizer(text)["input_ids"][-length:])
        most = max(len(row["choices"]) for row in rows)
        # The token of a letter after "Answer:" includes the space before it, where the tokeniser keeps that.
        letters = [
            tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS[:most]
        ]
        return cls(ids, [row["answer"] for row in rows], letters, tokenizer.pad_token_id)

    def lengths(self) -> Sequence[int]:
        """Return the number of tokens of every question."""
        return [len(each) for each in self.ids]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Return token ids and mask `[B, S]`, and `answers` `[B]`."""
        ids, mask = padded([self.ids[at] for at in chosen], self.padding)
        return {"input_ids": ids, "attention_mask": mask, "answers": torch.tensor([self.answers[at] for at in chosen])}


def asked(row: Mapping[str, Any]) -> str:
    """Format a question and its choices, one line each, and the word "Answer:" before the letter."""
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([row["question"], *choices, "Answer:"])


@torch.no_grad()
def evaluate_choices(model: nn.Module, part: Questions, size: int) -> dict[str, Any]:
    """Return the share of questions answered correctly, and the mean loss of the right letter among the letters."""
    model.eval()
    right, loss = 0, 0.0
    for batch in part.batches(size):
        batch = on(device_of(model), batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        last = batch["attention_mask"].sum(1) - 1
        found = logits[torch.arange(len(last), device=last.device), last][:, list(part.letters)].float()
        right += int((found.argmax(1) == batch["answers"]).sum())
        loss += nn.functional.cross_entropy(found, batch["answers"], reduction="sum").item()
    return {"metric": right / len(part), "loss": loss / len(part)}
