"""GSM8K: worked solutions of grade-school problems, judged by the loss of held-out solutions.

Models as small as those that train here write hardly any right answer, so no text is generated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, device_of, existing, on
from benchmarks.quality.tasks.generation import IGNORED, Prompt, Writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance


@dataclass(frozen=True)
class Solutions(Task):
    """Problems with worked solutions.

    Attributes:
        file: a path in the data folder; each line has `question` and `answer`.
        tested: the number of problems that are used for the test only.
    """

    file: str = "gsm8k/train.jsonl"
    tested: int = 64
    metric: str = "token accuracy"
    further: Sequence[str] = ()

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Writing, Writing]:
        """Shuffle the problems in a fixed order and split them. Problems that are longer than `length` are left out.

        Raises:
            TaskError: the file is missing, or has too few problems.
        """
        tokenizer = load_tokenizer(model, folder)
        rows = [json.loads(line) for line in existing(folder / self.file).read_text(encoding="utf-8").splitlines()]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [Prompt(f"Question: {rows[at]['question']}\nAnswer:", [" " + rows[at]["answer"]]) for at in order]
        prompts = [each for each in prompts if _tokens(tokenizer, each) < sizes.length]
        # The test comes from the end, so that it does not change with `train` or `validation`.
        tested = self.tested + sizes.extra_test
        if len(prompts) < sizes.train + sizes.validation + tested:
            raise TaskError(
                f"{folder / self.file} has {len(prompts)} problems of at most {sizes.length} tokens, and "
                f"{sizes.train + sizes.validation + tested} are asked for; ask for fewer."
            )
        parts = prompts[-tested:], prompts[: sizes.validation], prompts[sizes.validation :][: sizes.train]
        test, validation, train = (
            Writing.encode(part, tokenizer=tokenizer, length=sizes.length, decoder_only=True) for part in parts
        )
        return Data(train, validation, test)

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Load the pre-trained model; it has no head for `seed` to initialise."""
        return load_decoder(model, folder)

    def provenance(self, folder: Path, model: str) -> dict[str, Any]:
        """Return a digest of the weights of a model that was made here."""
        return provenance(model, folder)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Writing, size: int) -> dict[str, Any]:
        """Return the mean loss of the solutions' tokens, and the share of them that are the likeliest ones."""
        model.eval()
        loss, right, tokens = 0.0, 0, 0
        for batch in part.batches(size):
            batch = on(device_of(model), batch)
            labels = batch.pop("labels")[:, 1:]
            carries = labels != IGNORED
            logits, wanted = model(**batch).logits[:, :-1][carries].float(), labels[carries]
            loss += nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            right += int((logits.argmax(1) == wanted).sum())
            tokens += len(wanted)
        return {"metric": right / tokens, "loss": loss / tokens}


def _tokens(tokenizer: Any, prompt: Prompt) -> int:
    """Return the number of tokens of a prompt and its reference, without the end of text."""
    asked, answer = tokenizer(prompt.text)["input_ids"], tokenizer(prompt.references[0], add_special_tokens=False)
    return len(asked) + len(answer["input_ids"])
