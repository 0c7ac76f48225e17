"""Elementary science: ARC-Easy and OpenBookQA together, judged by the likelihood of the answers.

The files hold instructions whose answers are numbers, as IST's authors train and judge. A model as small as those that
train here tells numbers no better than chance (SmolLM2-135M 20 and 22 of 100, and of the texts 50 and 28), so it learns
to write the answer itself, and has chosen right if that is the likeliest of the four.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.tasks.answers import Answers, evaluate_answers
from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, existing
from benchmarks.quality.tasks.generation import Prompt, Writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance

CHOICES = 4
"""Questions with more or fewer choices, one in two hundred, are left out."""

Parts = Mapping[str, Answers]


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    text: str
    choices: Sequence[str]
    answer: int

    @classmethod
    def read(cls, row: Mapping[str, str]) -> "Question":
        """Take an instruction apart: the question, "Answer1: ..." to the last one, and "Answer format: ..."."""
        text, *choices = re.split(r"\s*\bAnswer\d+: ?", row["instruction"].rsplit("Answer format:", 1)[0])
        text = text.removeprefix("Please choose the correct answer to the question:")
        return cls(text.strip(), [each.strip() for each in choices], int(row["answer"].removeprefix("answer")) - 1)

    def asked(self) -> str:
        """Return what a model is asked."""
        return f"Question: {self.text}\nAnswer:"


@dataclass(frozen=True)
class Science(Task):
    """Questions with four choices.

    Attributes:
        files: for each data set a path in the data folder: a list of `instruction`, `output` and `answer`.
        tested: the number of questions of each data set that are used for the test only.
    """

    files: Mapping[str, str] = field(
        default_factory=lambda: {"ARC-Easy": "arc_easy/train.json", "OpenBookQA": "openbookqa/train.json"}, hash=False
    )
    tested: int = 150
    metric: str = "accuracy"

    @property
    def further(self) -> Sequence[str]:  # type: ignore[override]
        """The data sets, each with an accuracy of its own, in per cent."""
        return tuple(self.files)

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Writing, Parts]:
        """Shuffle the questions of each data set in a fixed order and split them; train on both, mixed.

        Questions that are longer than `length` tokens are left out. A validation part has `validation` questions of
        each data set.

        Raises:
            TaskError: a file is missing, or has too few questions.
        """
        tokenizer = load_tokenizer(model, folder)
        train: list[Prompt] = []
        validation, test = {}, {}
        for name, file in self.files.items():
            found = self._read(existing(folder / file), tokenizer, sizes.length)
            tested = self.tested + sizes.extra_test
            if len(found) < sizes.validation + tested:
                raise TaskError(f"{folder / file} has {len(found)} questions that fit; ask for fewer.")
            # The test comes from the end, so that it does not change with `train` or `validation`.
            test[name] = _answers(found[-tested:], tokenizer)
            validation[name] = _answers(found[: sizes.validation], tokenizer)
            rest = found[sizes.validation : -tested]
            train += [Prompt(each.asked(), [f" {each.choices[each.answer]}"]) for each in rest]
        if len(train) < sizes.train:
            raise TaskError(f"there are {len(train)} questions to train on, not {sizes.train}; ask for fewer.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1)).tolist()
        chosen = [train[at] for at in order[: sizes.train]]
        return Data(
            Writing.encode(chosen, tokenizer=tokenizer, length=sizes.length, decoder_only=True), validation, test
        )

    def _read(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Question]:
        """Return the distinct questions with four choices and at most `length` tokens in all, in a fixed order."""
        rows = {row["instruction"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
        questions = [Question.read(row) for row in rows.values()]
        found = [each for each in questions if len(each.choices) == CHOICES]
        lengths = _answers(found, tokenizer).lengths() if found else []
        found = [each for each, tokens in zip(found, lengths, strict=True) if tokens < length]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        return [found[at] for at in order]

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Load the pre-trained model; it has no head for `seed` to initialise."""
        return load_decoder(model, folder)

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Return a digest of the weights of a model that was made here."""
        return provenance(model, folder)

    def evaluate(self, model: nn.Module, part: Parts, size: int) -> dict[str, Any]:
        """Return the accuracy and the loss of the right answers, each the mean over the data sets."""
        found = {name: evaluate_answers(model, questions, size) for name, questions in part.items()}
        return {
            "metric": sum(each["metric"] for each in found.values()) / len(found),
            "loss": sum(each["loss"] for each in found.values()) / len(found),
            "further": {name: 100 * each["metric"] for name, each in found.items()},
        }


def _answers(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> Answers:
    return Answers(
        [tokenizer(each.asked())["input_ids"] for each in questions],
        [[tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in each.choices] for each in questions],
        [each.answer for each in questions],
        tokenizer.pad_token_id,
    )
