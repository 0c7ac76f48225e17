"""Elementary science: ARC-Easy and OpenBookQA together, judged by the likelihood of the answers.

The questions are instructions, in the form in which IST's authors train and judge on them. A model learns to write "the
correct answer is answer2". It has chosen right if the right number is the likeliest among the possible ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, existing
from benchmarks.quality.tasks.choices import Questions, evaluate_choices
from benchmarks.quality.tasks.generation import Prompt, Writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance

BEFORE = "the correct answer is answer"
CHOICES = 4
"""Questions with more or fewer choices, one in two hundred, are left out."""

Parts = Mapping[str, Questions]


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
    tested: int = 250
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
            rows = self._read(existing(folder / file), tokenizer, sizes.length)
            tested = self.tested + sizes.extra_test
            if len(rows) < sizes.validation + tested:
                raise TaskError(f"{folder / file} has {len(rows)} questions that fit; ask for fewer.")
            # The test comes from the end, so that it does not change with `train` or `validation`.
            test[name] = _questions(rows[-tested:], tokenizer)
            validation[name] = _questions(rows[: sizes.validation], tokenizer)
            train += [Prompt(_asked(row), [row["output"]]) for row in rows[sizes.validation : -tested]]
        if len(train) < sizes.train:
            raise TaskError(f"there are {len(train)} questions to train on, not {sizes.train}; ask for fewer.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1)).tolist()
        chosen = [train[at] for at in order[: sizes.train]]
        return Data(
            Writing.encode(chosen, tokenizer=tokenizer, length=sizes.length, decoder_only=True), validation, test
        )

    def _read(self, path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Mapping[str, Any]]:
        """Return the distinct questions with four choices and at most `length` tokens, in a fixed order."""
        rows = {row["instruction"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
        found = [
            row
            for row in rows.values()
            if row["instruction"].rsplit("Answer format:", 1)[-1].count("answer") == CHOICES
            and len(tokenizer(_asked(row) + row["output"])["input_ids"]) < length
        ]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        return [found[at] for at in order]

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Load the pre-trained model; it has no head for `seed` to initialise."""
        return load_decoder(model, folder)

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Return a digest of the weights of a model that was made here."""
        return provenance(model, folder)

    def evaluate(self, model: nn.Module, part: Parts, size: int) -> dict[str, Any]:
        """Return the accuracy and the loss among the four numbers, each the mean over the data sets."""
        found = {name: evaluate_choices(model, questions, size) for name, questions in part.items()}
        return {
            "metric": sum(each["metric"] for each in found.values()) / len(found),
            "loss": sum(each["loss"] for each in found.values()) / len(found),
            "further": {name: 100 * each["metric"] for name, each in found.items()},
        }


def _asked(row: Mapping[str, Any]) -> str:
    return row["instruction"] + "\n\n"


def _questions(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Tokenise the questions up to the number of the answer.

    Raises:
        TaskError: the tokenizer does not write the number as a token of its own.
    """
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    letters = []
    for number in range(1, CHOICES + 1):
        whole = tokenizer(f"{BEFORE}{number}", add_special_tokens=False)["input_ids"]
        if whole[:-1] != before:
            raise TaskError(f"the tokenizer of this model makes one token of 'answer{number}'; use another model.")
        letters.append(whole[-1])
    ids = [tokenizer(_asked(row))["input_ids"] + before for row in rows]
    answers = [int(row["answer"].removeprefix("answer")) - 1 for row in rows]
    return Questions(ids, answers, letters, tokenizer.pad_token_id)
