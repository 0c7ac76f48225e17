"""Questions with lettered choices; the model's answer is the letter that it finds likeliest to follow."""

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
    """Token ids of questions, up to where the letter would follow.

    Attributes:
        ids: of every question.
        answers: the place of the right choice among the choices.
        letters: the token of each letter.
        padding: fills batches up.
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
        """Put answered questions of the same subject before each question.

        Args:
            rows: with `question`, `choices`, `answer` (the place of the right one) and `subject`.
            examples: answered questions, of the same form.
            tokenizer: of the model.
            shots: how many answered questions go before one.
            length: most tokens; of longer ones the beginning is cut off.
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
        # As it stands after the question: with the space before it, where the tokeniser keeps that.
        letters = [
            tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"][-1] for letter in LETTERS[:most]
        ]
        return cls(ids, [row["answer"] for row in rows], letters, tokenizer.pad_token_id)

    def lengths(self) -> Sequence[int]:
        """Tokens of every question."""
        return [len(each) for each in self.ids]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Ids and mask `[B, S]`; `answers` `[B]`."""
        ids, mask = padded([self.ids[at] for at in chosen], self.padding)
        return {"input_ids": ids, "attention_mask": mask, "answers": torch.tensor([self.answers[at] for at in chosen])}


def asked(row: Mapping[str, Any]) -> str:
    """A question and its choices, a line each, and the word after which the letter belongs."""
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return "\n".join([row["question"], *choices, "Answer:"])


@torch.no_grad()
def evaluate_choices(model: nn.Module, part: Questions, size: int) -> dict[str, Any]:
    """The share of questions answered rightly, and the mean loss of the right letter among the letters."""
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
