"""Tasks with data of a hub: the paper's set-ups take a step on tiny models and data; errors name what is missing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.quality import run as quality
from benchmarks.quality.grid import Grid, GridError
from benchmarks.quality.rows import Rows
from benchmarks.quality.tasks import Sizes, TaskError, find_task
from benchmarks.quality.tasks.choices import Questions, asked, evaluate_choices
from benchmarks.quality.tasks.hub import load_splits
from benchmarks.quality.tasks.small_gpt2 import train_tokenizer

GRIDS = Path(quality.__file__).parent / "grids"
PAPER = ("paper_roberta_glue", "paper_gpt2_e2e", "paper_t5_superni", "paper_llama_oasst1")


def roberta(vocabulary: int, padding: int) -> PreTrainedModel:
    return RobertaModel(
        RobertaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=400,
            pad_token_id=padding,
        )
    )


def gpt2(vocabulary: int, padding: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=400))


def t5(vocabulary: int, padding: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            pad_token_id=padding,
            decoder_start_token_id=padding,
        )
    )


def llama(vocabulary: int, padding: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )


def bert(vocabulary: int, padding: int) -> PreTrainedModel:
    return BertModel(
        BertConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )


MODELS: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "FacebookAI/roberta-large": roberta,
    "openai-community/gpt2-large": gpt2,
    "google-t5/t5-large": t5,
    "huggyllama/llama-7b": llama,
}


def save_model(folder: Path, make: Callable[[int, int], PreTrainedModel]) -> str:
    tokenizer = train_tokenizer([], 258)
    torch.manual_seed(0)
    make(len(tokenizer), tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows_like(data: str, name: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return splits with the columns of the data set, of a few rows each."""
    numbers = range(12)
    if data == "nyu-mll/glue":
        columns = {
            "mnli": ("premise", "hypothesis"),
            "qnli": ("question", "sentence"),
            "qqp": ("question1", "question2"),
            "sst2": ("sentence",),
            "cola": ("sentence",),
        }.get(str(name), ("sentence1", "sentence2"))
        labels: list[float] = [n / 3 if name == "stsb" else n % 2 for n in numbers]
        rows: list[dict[str, Any]] = [{column: f"{column} {n}" for column in columns} for n in numbers]
        rows = [{**row, "label": label, "idx": n} for n, (row, label) in enumerate(zip(rows, labels, strict=True))]
        return {"train": rows, "validation_matched" if name == "mnli" else "validation": rows[:4]}
    if data == "tuetschek/e2e_nlg":
        texts = [
            {"meaning_representation": f"name[{n // 2}], area[riverside]", "human_reference": f"{n} is by the river."}
            for n in numbers
        ]
        return {"train": texts, "validation": texts[:4], "test": texts[8:]}
    if data == "Muennighoff/natural-instructions":
        instances = [
            {"task_name": "t", "id": f"t-{n}", "definition": "Say {it}.", "inputs": f"{n}", "targets": f"it is {n}"}
            for n in numbers
        ]
        return {"train": instances, "validation": instances[:4], "test": instances[8:]}
    if data == "timdettmers/openassistant-guanaco":
        chats = [{"text": f"### Human: what is {n}?### Assistant: a number"} for n in numbers]
        return {"train": chats, "test": chats[:4]}
    assert data == "cais/mmlu"
    questions = [
        {
            "question": f"What is {n}?",
            "subject": ("abstract_algebra", "anatomy")[n % 2],
            "choices": ["w", "x", "y", "z"],
            "answer": n % 4,
        }
        for n in numbers
    ]
    return {"dev": questions, "validation": questions[:4], "test": questions[4:]}


def save_data(folder: Path, data: str, name: str | None) -> str:
    splits = {split: datasets.Dataset.from_list(rows) for split, rows in rows_like(data, name).items()}
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def shrunk(grid: Grid, folder: Path) -> Grid:
    """Return a grid of the same tasks, methods and scope, for one step of a tiny model on data of the same schema."""
    hub = {}
    for task, said in grid.hub.items():
        hub[task] = {**said, "data": save_data(folder / task, said["data"], said.get("name")), "dtype": "float32"}
        if "questions" in said:
            hub[task]["questions"] = save_data(folder / "q", said["questions"], said["questions_name"])
        if "new_tokens" in said:
            hub[task]["new_tokens"] = 4
        if "tested" in said:
            hub[task]["tested"] = 3
    sizes: dict[str, Any] = {"train": 4, "validation": 2, "epochs": 1, "batch": 4, "samples": 4, "block_size": 16}
    model = save_model(folder / "model", MODELS[grid.settings.model])
    return replace(
        grid,
        tasks={task: {} for task in grid.tasks},
        hub=hub,
        settings=replace(grid.settings, model=model, sparsity=0.5, length=300, partitions=1, **sizes),
        vary={},
        learning_rates=[1e-3],
        seeds=[0],
    )


@pytest.fixture
def _no_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    # METEOR takes many seconds to start, and has its own test.
    metrics = pytest.importorskip(
        "benchmarks.quality.tasks.metrics", exc_type=ImportError, reason="a library of the bench extra is missing"
    )
    monkeypatch.setattr(metrics, "java", lambda: None)


class TestThePapersSetUps:
    @pytest.mark.usefixtures("_no_meteor")
    @pytest.mark.parametrize("name", PAPER)
    def test_take_a_step_on_a_small_scale(self, name: str, tmp_path: Path) -> None:
        grid = Grid.read(GRIDS / f"{name}.toml")
        small = shrunk(grid, tmp_path)
        if name == "paper_roberta_glue":
            # STS-B has pairs of sentences and a number as the label.
            small = replace(small, tasks={"stsb": {}})
        small = replace(small, methods={key: grid.methods[key] for key in ("LoRA", "sylva, paper")})
        rows = Rows(tmp_path / "rows.jsonl")
        quality.run_grid(small, rows, tmp_path)
        found = rows.read().values()
        assert len(found) == 2 * len(small.tasks)
        for row in found:
            assert row["run"]["hub"]["kind"] == small.hub[row["run"]["task"]]["kind"]
            assert row["result"]["steps"] == 1
            assert row["result"]["test"]["loss"] > 0

    @pytest.mark.parametrize("name", PAPER)
    def test_name_columns_and_splits_that_the_data_have(self, name: str) -> None:
        grid = Grid.read(GRIDS / f"{name}.toml")
        for table in grid.hub.values():
            rows = rows_like(table["data"], table.get("name"))
            columns = set(rows["train"][0])
            if table["kind"] == "labels":
                assert {*table["text"], "label"} <= columns
            assert table.get("test", "test") in rows or table["kind"] == "chat"


class TestData:
    @staticmethod
    def e2e(folder: Path) -> Any:
        return find_task("e2e", Grid.read(GRIDS / "paper_gpt2_e2e.toml").hub["e2e"] | {"data": str(folder)})

    def test_no_prompt_is_on_two_sides(self, tmp_path: Path) -> None:
        save_data(tmp_path / "data", "tuetschek/e2e_nlg", None)
        model = save_model(tmp_path / "model", gpt2)
        data = self.e2e(tmp_path / "data").load(tmp_path, model, Sizes(0, 3, 0, 300))
        texts = [{prompt.text for prompt in part.prompts} for part in (data.train, data.validation, data.test)]
        assert all(texts)
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
        assert all(len(prompt.references) == 2 for prompt in data.train.prompts)
        again = self.e2e(tmp_path / "data").load(tmp_path, model, Sizes(0, 3, 0, 300))
        assert [prompt.text for prompt in again.train.prompts] == [prompt.text for prompt in data.train.prompts]

    def test_pairs_have_token_types_where_the_model_asks_for_them(self, tmp_path: Path) -> None:
        save_data(tmp_path / "data", "nyu-mll/glue", "rte")
        model = save_model(tmp_path / "model", bert)
        words = AutoTokenizer.from_pretrained(model).backend_tokenizer
        words.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        names = ["input_ids", "token_type_ids", "attention_mask"]
        padding = words.id_to_token(0)
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token=padding, eos_token=padding, model_input_names=names
        ).save_pretrained(model)
        table = {"kind": "labels", "data": str(tmp_path / "data"), "text": ["sentence1", "sentence2"]}
        task = find_task("rte", {**table, "test": "validation"})
        data = task.load(tmp_path, model, Sizes(4, 2, 0, 64))
        assert len(data.train) == 4
        made = task.make_model(tmp_path, model, 0)
        assert set(task.evaluate(made, data.test, 2)) == {"metric", "loss"}
        types = data.train.batches(2)[0]["token_type_ids"]
        assert set(types.unique().tolist()) == {0, 1}

    def test_what_is_missing_is_said_in_a_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(TaskError, match=r"huggingface\.co") as caught:
            load_splits("nobody/nothing-of-this-name", None, None)
        assert "\n" not in str(caught.value)
        task = find_task("e2e", {**Grid.read(GRIDS / "paper_gpt2_e2e.toml").hub["e2e"]})
        with pytest.raises(TaskError, match=r"the model .*name a folder"):
            task.make_model(tmp_path, str(tmp_path / "nowhere"), 0)

    def test_too_many_rows_and_unknown_splits_are_refused(self, tmp_path: Path) -> None:
        save_data(tmp_path / "data", "tuetschek/e2e_nlg", None)
        model = save_model(tmp_path / "model", gpt2)
        with pytest.raises(TaskError, match="ask for fewer"):
            self.e2e(tmp_path / "data").load(tmp_path, model, Sizes(50, 3, 0, 300))
        with pytest.raises(TaskError, match="tested"):
            self.e2e(tmp_path / "data").load(tmp_path, model, Sizes(0, 3, 5, 300))
        with pytest.raises(TaskError, match="no split 'dev'; use one of"):
            replace(self.e2e(tmp_path / "data"), test="dev").load(tmp_path, model, Sizes(0, 3, 0, 300))

    @pytest.mark.parametrize(
        "table",
        [
            'kind = "guessing"',
            'kind = "labels", data = "x"',
            'kind = "labels", data = "x", text = ["a"], colour = 1',
            'kind = "labels", data = "x", text = ["a"], metric = "BLEU"',
            'kind = "labels", data = "x", text = ["a"], dtype = "nn"',
            'kind = "chat", data = "x", target = "{a}", questions = "y", dtype = "nn"',
        ],
    )
    def test_tables_that_mean_nothing_are_refused(self, tmp_path: Path, table: str) -> None:
        path = tmp_path / "grid.toml"
        path.write_text(
            f"learning_rates = [1e-3]\nseeds = [0]\ntasks = {{ a = {{ hub = {{ {table} }} }} }}\n"
            'methods = { full = { kind = "full" } }\n'
        )
        with pytest.raises(GridError, match=r"use|add"):
            Grid.read(path)


class _Says(nn.Module):
    """A model that answers every question with the second letter."""

    def __init__(self, letters: list[int]) -> None:
        super().__init__()
        self.letters, self.weight = letters, nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, 300)
        logits[torch.arange(len(input_ids)), attention_mask.sum(1) - 1, self.letters[1]] = 9.0
        return type("Output", (), {"logits": logits})


def test_questions_are_answered_by_the_likeliest_letter() -> None:
    rows = rows_like("cais/mmlu", "all")
    tokenizer = train_tokenizer([], 258)
    part = Questions.encode(rows["test"], rows["dev"], tokenizer, shots=1, length=2048)
    text = tokenizer.decode(part.ids[0])
    assert "abstract algebra" in text
    assert text.count("Answer:") == 2
    assert text.endswith(asked(rows["test"][0]))
    found = evaluate_choices(_Says(list(part.letters)), part, 3)
    assert found["metric"] == sum(row["answer"] == 1 for row in rows["test"]) / len(part)
