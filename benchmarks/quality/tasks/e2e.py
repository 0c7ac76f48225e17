"""The E2E challenge: from a meaning (`name[...], food[...]`) to a sentence; several references a meaning."""

import csv
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, existing, without_dropout
from benchmarks.quality.tasks.generation import Prompt, Writing, evaluate_writing
from benchmarks.quality.tasks.small_gpt2 import RECIPES, pretrained


@dataclass(frozen=True)
class E2E(Task):
    """Sentences about restaurants, written by a decoder.

    Attributes:
        file: in the data folder, with columns `mr` and `ref`.
        tested: meanings that are only ever tested on.
        new_tokens: at most so many are written.
    """

    file: str = "e2e/devset.csv"
    tested: int = 100
    new_tokens: int = 80
    metric: str = "BLEU"
    further: Sequence[str] = ("NIST", "METEOR", "ROUGE-L", "CIDEr")

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Writing, Writing]:
        """Shuffle the distinct meanings, always alike, and cut them apart; all references of one stay together.

        Raises:
            TaskError: there is no such file, or it has fewer references or meanings.
        """
        tokenizer = AutoTokenizer.from_pretrained(_folder(folder, model))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        meanings = self.read(existing(folder / self.file))
        order = torch.randperm(len(meanings), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [meanings[at] for at in order]
        # Counted from the end, the test stays what it is when `train` or `validation` changes.
        kept = len(prompts) - self.tested - sizes.extra_test
        rest, test = prompts[: max(0, kept)], prompts[max(0, kept) :]
        validation, training = rest[: sizes.validation], rest[sizes.validation :]
        examples = [Prompt(prompt.text, [reference]) for prompt in training for reference in prompt.references]
        if len(examples) < sizes.train:
            raise TaskError(
                f"{folder / self.file} leaves {len(examples)} references to train on, and {sizes.train} are asked for; "
                "ask for fewer."
            )
        # Not the first ones: so few meanings would have so many references.
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
        chosen = [examples[at] for at in order[: sizes.train]]
        encode = functools.partial(Writing.encode, tokenizer=tokenizer, length=sizes.length, decoder_only=True)
        return Data(encode(chosen), encode(validation), encode(test))

    def read(self, path: Path) -> list[Prompt]:
        """The distinct meanings of a file, in its order."""
        references: dict[str, list[str]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                references.setdefault(row["mr"], []).append(row["ref"])
        # The space belongs to the first word, as it does in the middle of a text.
        return [Prompt(prompt_of(meaning), [" " + ref for ref in found]) for meaning, found in references.items()]

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """The pre-trained model; there is no head for `seed` to draw."""
        path = _folder(folder, model)
        config = without_dropout(AutoConfig.from_pretrained(path))
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Of a model that was pre-trained here, a digest of its weights."""
        if model not in RECIPES:
            return {}
        weights = (Path(_folder(folder, model)) / "model.safetensors").read_bytes()
        return {"base": hashlib.sha256(weights).hexdigest()[:12]}

    def evaluate(self, model: nn.Module, part: Writing, size: int) -> dict[str, Any]:
        """BLEU and the others of what the model writes, and the mean loss over the tokens of first references."""
        return evaluate_writing(model, part, size, scores=_scores, metric=self.metric, new_tokens=self.new_tokens)


def prompt_of(meaning: str) -> str:
    """`name[Alimentum], area[city centre]` as `name: Alimentum; area: city centre ->`."""
    fields = [field.rstrip("]").partition("[") for field in meaning.split("], ")]
    return "; ".join(f"{name}: {value}" for name, _, value in fields) + " ->"


def _scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
    # Seconds to import, and only evaluation wants them.
    from benchmarks.quality.tasks.metrics import text_metrics

    return text_metrics(texts, [[reference.strip() for reference in each] for each in references])


@functools.cache
def _folder(data: Path, model: str) -> str:
    return str(pretrained(model, data)) if model in RECIPES else model
