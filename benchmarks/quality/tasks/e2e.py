"""The E2E challenge: write a sentence for a meaning (`name[...], food[...]`), which has several references."""

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, existing
from benchmarks.quality.tasks.generation import Prompt, Writing, evaluate_writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance


@dataclass(frozen=True)
class E2E(Task):
    """Sentences about restaurants, written by a decoder.

    Attributes:
        file: a path in the data folder; the file has the columns `mr` and `ref`.
        tested: the number of meanings that are used for the test only.
        new_tokens: the maximum number of tokens to write.
    """

    file: str = "e2e/devset.csv"
    tested: int = 100
    new_tokens: int = 80
    metric: str = "BLEU"
    further: Sequence[str] = ("NIST", "METEOR", "ROUGE-L", "CIDEr")

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Writing, Writing]:
        """Shuffle the distinct meanings in a fixed order and split them; the references of a meaning stay together.

        Raises:
            TaskError: the file is missing, or has too few references or meanings.
        """
        tokenizer = load_tokenizer(model, folder)
        meanings = self.read(existing(folder / self.file))
        order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [meanings[at] for at in order]
        # The test comes from the end, so that it does not change with `train` or `validation`.
        kept = len(prompts) - self.tested - sizes.extra_test
        rest, test = prompts[: max(0, kept)], prompts[max(0, kept) :]
        validation, training = rest[: sizes.validation], rest[sizes.validation :]
        examples = [Prompt(prompt.text, [reference]) for prompt in training for reference in prompt.references]
        if len(examples) < sizes.train:
            raise TaskError(
                f"{folder / self.file} leaves {len(examples)} references to train on, and {sizes.train} are asked for; "
                "ask for fewer."
            )
        # Shuffled, since the first references would all belong to a few meanings.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
        chosen = [examples[at] for at in order[: sizes.train]]
        encode = functools.partial(Writing.encode, tokenizer=tokenizer, length=sizes.length, decoder_only=True)
        return Data(encode(chosen), encode(validation), encode(test))

    def read(self, path: Path) -> list[Prompt]:
        """Return the distinct meanings of a file, in its order."""
        references: dict[str, list[str]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                references.setdefault(row["mr"], []).append(row["ref"])
        # The space makes the first word the same token as in the middle of a text.
        return [Prompt(prompt_of(meaning), [" " + ref for ref in found]) for meaning, found in references.items()]

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Load the pre-trained model; it has no head for `seed` to initialise."""
        return load_decoder(model, folder)

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Return a digest of the weights of a model that was made here."""
        return provenance(model, folder)

    def evaluate(self, model: nn.Module, part: Writing, size: int) -> dict[str, Any]:
        """Return BLEU and the other metrics of the model's texts, and the mean token loss of first references."""
        return evaluate_writing(model, part, size, scores=_scores, metric=self.metric, new_tokens=self.new_tokens)


def prompt_of(meaning: str) -> str:
    """Return `name[Alimentum], area[city centre]` as `name: Alimentum; area: city centre ->`."""
    fields = [field.rstrip("]").partition("[") for field in meaning.split("], ")]
    return "; ".join(f"{name}: {value}" for name, _, value in fields) + " ->"


def _scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
    # The import takes seconds, and only evaluation needs it.
    from benchmarks.quality.tasks.metrics import text_metrics

    return text_metrics(texts, [[reference.strip() for reference in each] for each in references])
