"""Tasks on data sets of a hub, each described by a table in a grid file: `[tasks.NAME.hub]`.

A data set is named as `datasets.load_dataset` takes it, or is a folder that `DatasetDict.save_to_disk` wrote. Rows are
shuffled in a fixed order; validation rows come from the training split unless the table names a split for them.
"""

import itertools
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.quality.tasks.base import Data, Sizes, Task, TaskError, without_dropout
from benchmarks.quality.tasks.choices import Questions, evaluate_choices
from benchmarks.quality.tasks.classification import Score, Sentences, evaluate_labels
from benchmarks.quality.tasks.generation import Prompt, Writing, evaluate_writing

LABEL_METRICS: Mapping[str, Score] = {
    "accuracy": accuracy_score,
    "F1": f1_score,
    "Matthews correlation": matthews_corrcoef,
    "Pearson correlation": lambda labels, predictions: correlation(labels, predictions),
}
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class HubTask(Task):
    """The fields that all tables share.

    Attributes:
        data: the name or folder of the data set.
        name: the name of its configuration.
        revision: the revision of its repository; "refs/convert/parquet" where its main branch has a script.
        train, validation, test: the names of splits; validation None: rows of the training split.
        tested: the maximum number of rows to test on; 0: all.
        dtype: the dtype of the model's weights.
    """

    data: str
    name: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str = "test"
    tested: int = 0
    dtype: str = "float32"

    def check(self) -> str | None:
        """Return the problem with the table, or None."""
        known = isinstance(getattr(torch, self.dtype, None), torch.dtype)
        return None if known else f"dtype={self.dtype!r}; use float32 or bfloat16"

    @abstractmethod
    def asked(self, row: Mapping[str, Any]) -> Hashable:
        """Return the part of a row that the model sees; rows with equal parts stay in one part of the data."""

    def parts(self, sizes: Sizes) -> tuple[Rows, Rows, Rows]:
        """Return rows to train on, to choose the learning rate on, and to test on.

        No question of the test is in another part, and no question of the validation is in training. `sizes.validation`
        counts distinct questions, each with all its rows; 0: all of the split that the table names.

        Raises:
            TaskError: a split or a size is missing, or too few rows are left.
        """
        if sizes.extra_test:
            raise TaskError("extra_test is for tasks in files; name the split to test on, and cap it with tested.")
        splits = load_splits(self.data, self.name, self.revision)
        train = shuffled(splits, self.train, self.data)
        test = list(shuffled(splits, self.test, self.data)[: self.tested or None])
        used = {self.asked(row) for row in test}
        if self.validation is None and not sizes.validation:
            raise TaskError(f"{self.data} names no split for validation; name one, or say how many to take.")
        source = shuffled(splits, self.validation, self.data) if self.validation else train
        chosen: set[Hashable] = set()
        held = []
        for row in source:
            asked = self.asked(row)
            if asked in used:
                continue
            if asked in chosen or not sizes.validation or len(chosen) < sizes.validation:
                chosen.add(asked)
                held.append(row)
        if not held:
            raise TaskError(f"{self.data} leaves nothing for validation that is not in the test.")
        used |= chosen
        rest = (row for row in train if self.asked(row) not in used)
        kept = list(itertools.islice(rest, sizes.train or None))
        if len(kept) < max(1, sizes.train):
            raise TaskError(f"{self.data} leaves {len(kept)} rows to train on, of {sizes.train}; ask for fewer.")
        return kept, held, test

    def tokenizer(self, model: str) -> PreTrainedTokenizerBase:
        """Load the model's tokeniser, with a padding token."""
        with said_in_a_line(f"the tokeniser of {model}"):
            tokenizer = AutoTokenizer.from_pretrained(model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(self, kind: Any, model: str, **rest: Any) -> PreTrainedModel:
        """Load a pre-trained model with the `Auto...` class `kind`; `rest` goes into its configuration."""
        with said_in_a_line(f"the model {model}"):
            config = without_dropout(AutoConfig.from_pretrained(model, **rest))
            loaded = kind.from_pretrained(model, config=config, dtype=getattr(torch, self.dtype))
        if loaded.config.pad_token_id is None:
            # A decoder's classifier reads the last token that is not padding.
            loaded.config.pad_token_id = self.tokenizer(model).pad_token_id
        return loaded


@dataclass(frozen=True, kw_only=True)
class HubLabels(HubTask):
    """Sentences, or pairs of them, with labels.

    Attributes:
        text: the column of the sentence, or the two columns of a pair.
        label: the column of labels.
        classes: the number of classes; 1: the label is a number, and the loss its squared error.
        metric: a name in `LABEL_METRICS`.
    """

    text: Sequence[str]
    label: str = "label"
    classes: int = 2
    metric: str = "accuracy"

    def check(self) -> str | None:
        """Return the problem with the table, or None."""
        if self.metric not in LABEL_METRICS:
            return f"metric={self.metric!r}; use one of {sorted(LABEL_METRICS)}"
        return super().check()

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Sentences, Sentences]:
        """See `Task`."""
        tokenizer = self.tokenizer(model)

        def encode(rows: Rows) -> Sentences:
            texts = [[row[column] for row in rows] for column in self.text]
            found = tokenizer(*texts, truncation=True, max_length=sizes.length)
            number = float if self.classes == 1 else int
            labels = [number(row[self.label]) for row in rows]
            return Sentences(found["input_ids"], labels, tokenizer.pad_token_id, found.get("token_type_ids"))

        return Data(*map(encode, self.parts(sizes)))

    def asked(self, row: Mapping[str, Any]) -> Hashable:
        """Return the sentence, or both of a pair."""
        return tuple(row[column] for column in self.text)

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """See `Task`."""
        torch.manual_seed(seed)
        return self.load_model(AutoModelForSequenceClassification, model, num_labels=self.classes)

    def evaluate(self, model: nn.Module, part: Sentences, size: int) -> dict[str, Any]:
        """See `Task`."""
        return evaluate_labels(model, part, size, LABEL_METRICS[self.metric])


@dataclass(frozen=True, kw_only=True)
class HubWriting(HubTask):
    """Prompts, and the texts that should follow them.

    Attributes:
        prompt: a template, such as "{question} Answer:". Rows of the same prompt are its references.
        target: a template of the text that should follow; it alone carries loss.
        decoder_only: whether the model is a decoder; otherwise it is an encoder-decoder.
        metric: "ROUGE-L", or "BLEU", which adds the other metrics of the E2E challenge.
        new_tokens: the maximum number of tokens to write.
    """

    prompt: str
    target: str
    decoder_only: bool
    metric: str = "ROUGE-L"
    new_tokens: int = 128

    @property
    def further(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the other metrics."""
        return ("NIST", "METEOR", "ROUGE-L", "CIDEr") if self.metric == "BLEU" else ()

    def check(self) -> str | None:
        """Return the problem with the table, or None."""
        return super().check() if self.metric in ("BLEU", "ROUGE-L") else f"metric={self.metric!r}; BLEU or ROUGE-L"

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Any, Any]:
        """See `Task`. No prompt is in two parts."""
        tokenizer = self.tokenizer(model)
        return Data(*(self.encode(self.prompts(rows), tokenizer, sizes.length) for rows in self.parts(sizes)))

    def asked(self, row: Mapping[str, Any]) -> Hashable:
        """Return the prompt."""
        return self.prompt.format(**row)

    def prompts(self, rows: Rows) -> list[Prompt]:
        """Return the distinct prompts with all their references."""
        found: dict[str, list[str]] = {}
        for row in rows:
            found.setdefault(self.prompt.format(**row), []).append(self.target.format(**row))
        return [Prompt(text, references) for text, references in found.items()]

    def encode(self, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, length: int) -> Writing:
        """Tokenise the prompts and their references."""
        return Writing.encode(prompts, tokenizer, length, decoder_only=self.decoder_only)

    def make_model(self, folder: Path, model: str, seed: int) -> PreTrainedModel:
        """See `Task`."""
        return self.load_model(AutoModelForCausalLM if self.decoder_only else AutoModelForSeq2SeqLM, model)

    def evaluate(self, model: nn.Module, part: Writing, size: int) -> dict[str, Any]:
        """See `Task`."""
        # The import takes seconds, and only evaluation needs it.
        from benchmarks.quality.tasks.metrics import rouge_l, text_metrics

        def rouge_alone(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
            return {"ROUGE-L": 100 * rouge_l(texts, references)}

        scores = text_metrics if self.metric == "BLEU" else rouge_alone
        return evaluate_writing(model, part, size, scores=scores, metric=self.metric, new_tokens=self.new_tokens)


@dataclass(frozen=True, kw_only=True)
class HubChat(HubWriting):
    """Training as in HubWriting, evaluation on multiple-choice questions of another data set (MMLU's columns).

    Attributes:
        questions: the data set of the questions; `validation` and `test` are splits of it.
        questions_name: the name of its configuration.
        shots: the number of answered questions before each question.
        shots_split: the split of the answered questions.
        questions_length: the maximum number of tokens of a question with the answered ones before it.
    """

    questions: str
    questions_name: str | None = None
    shots: int = 5
    shots_split: str = "dev"
    questions_length: int = 2048
    decoder_only: bool = True
    prompt: str = ""
    metric: str = "accuracy"
    validation: str = "validation"

    def check(self) -> str | None:
        """Return the problem with the table, or None."""
        if self.metric != "accuracy" or not self.decoder_only:
            return "kind='chat' trains a decoder; use decoder_only=true and metric='accuracy'"
        return HubTask.check(self)

    def load(self, folder: Path, model: str, sizes: Sizes) -> Data[Writing, Questions]:
        """See `Task`."""
        tokenizer = self.tokenizer(model)
        rows = shuffled(load_splits(self.data, self.name, self.revision), self.train, self.data)
        if len(rows) < sizes.train:
            raise TaskError(f"{self.data} has {len(rows)} rows to train on, not {sizes.train}; ask for fewer.")
        # Each row is a whole conversation and its own example, even where rows share a prompt.
        prompts = [
            Prompt(self.prompt.format(**row), [self.target.format(**row)]) for row in rows[: sizes.train or None]
        ]
        splits = load_splits(self.questions, self.questions_name, None)
        examples = list(shuffled(splits, self.shots_split, self.questions))

        def encode(split: str, most: int) -> Questions:
            chosen = shuffled(splits, split, self.questions)[: most or None]
            return Questions.encode(chosen, examples, tokenizer, shots=self.shots, length=self.questions_length)

        return Data(
            self.encode(prompts, tokenizer, sizes.length),
            encode(self.validation, sizes.validation),
            encode(self.test, self.tested),
        )

    def evaluate(self, model: nn.Module, part: Any, size: int) -> dict[str, Any]:
        """See `Task`."""
        return evaluate_choices(model, part, size)


KINDS: Mapping[str, type[HubTask]] = {"labels": HubLabels, "writing": HubWriting, "chat": HubChat}


def hub_task(table: Mapping[str, Any]) -> HubTask:
    """Make the task of a table, whose `kind` is a name in `KINDS`. Raises TaskError for unknown or missing names."""
    kind = KINDS.get(table.get("kind", ""))
    if kind is None:
        raise TaskError(f"kind={table.get('kind')!r}; use one of {sorted(KINDS)}")
    known = {each.name: each for each in fields(kind)}
    rest = {name: value for name, value in table.items() if name != "kind"}
    if strange := set(rest) - set(known):
        raise TaskError(f"unknown names {sorted(strange)}; use {sorted(known)}")
    needed = {name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    if missing := needed - set(rest):
        raise TaskError(f"{sorted(missing)} missing; add them")
    task = kind(**rest)
    if problem := task.check():
        raise TaskError(problem)
    return task


def correlation(labels: Sequence[float], predictions: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 where all predictions are equal."""
    if len(set(predictions)) == 1:
        return 0.0
    found: float = pearsonr(labels, predictions).statistic
    return found


def load_splits(data: str, name: str | None, revision: str | None) -> Mapping[str, Any]:
    """Load every split of a data set. Raises TaskError, in one line, where it cannot be loaded."""
    # The import takes seconds, and tasks in files do not need it.
    import datasets

    with said_in_a_line(f"the data set {data}"):
        if (Path(data) / "dataset_dict.json").exists():
            return datasets.load_from_disk(data)
        return datasets.load_dataset(data, name, revision=revision)


def shuffled(splits: Mapping[str, Any], split: str, data: str) -> Any:
    """Return the rows of a split, shuffled in a fixed order. Raises TaskError where there is no such split."""
    if split not in splits:
        raise TaskError(f"{data} has no split {split!r}; use one of {sorted(splits)}.")
    found = splits[split]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return _Lazy(found, order)


class _Lazy(Sequence[dict[str, Any]]):
    """Rows in a given order, each read on access; a slice reads no rows."""

    def __init__(self, rows: Any, order: Sequence[int]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Lazy(self.rows, self.order[at])
        return self.rows[self.order[at]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows.select(self.order)


@contextmanager
def said_in_a_line(what: str) -> Iterator[None]:
    """Turn the errors of a hub that is unreachable, or lacks `what`, into a TaskError of one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        # ConnectionError and the hub's own errors are OSErrors; an unknown configuration is a ValueError.
        reason = str(error).strip().split("\n")[0]
        raise TaskError(
            f"{what} cannot be loaded; run this where huggingface.co can be reached, or name a folder that holds it "
            f"({type(error).__name__}: {reason})"
        ) from error
