"""What carries loss, and how rows become sequences of one length."""

import json
from pathlib import Path

import pytest
from tiny_checkpoint import make_tokenizer
from transformers import PreTrainedTokenizerFast

from sylva_compile.cli.options import DataConfig
from sylva_compile.cli.sequences import IGNORED, Example, batches_of, encode, hold_out
from sylva_compile.cli.tables import read_rows
from sylva_compile.errors import InputError

TOKENIZER = make_tokenizer(chat=True)


def with_loss(example: Example, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    """Return the text that carries loss."""
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED]))


def whole(example: Example) -> str:
    """Return the text that gets attention."""
    return str(TOKENIZER.decode(example["input_ids"][: sum(example["attention_mask"])]))


def test_a_column_carries_loss_and_padding_none() -> None:
    rows = [{"text": "The pub"}, {"text": "The famous pub near the river"}, {"text": " "}, {"text": None}]
    short, long = encode(rows, TOKENIZER, DataConfig(column="text"))
    assert len(short["input_ids"]) == len(long["input_ids"]) == sum(long["attention_mask"])
    assert with_loss(short) == whole(short) == "The pub<|end|>"
    assert 0 < sum(short["attention_mask"]) < len(short["input_ids"])


def test_a_text_is_cut_without_the_remainder() -> None:
    text = "The pub near the river is good. " * 8
    examples = encode(text, TOKENIZER, DataConfig(max_length=10))
    ids = [token for example in examples for token in example["input_ids"]]
    assert ids == TOKENIZER(text).input_ids[: len(ids)] and len(TOKENIZER(text).input_ids) - len(ids) < 10
    assert all(example["labels"] == example["input_ids"] for example in examples)


def test_a_response_alone_carries_loss() -> None:
    rows = [{"question": "Which pub?", "answer": "The cheap one.", "n": 3}]
    options = DataConfig(prompt_template=r"{n}. {question}\n", response="answer")
    (example,) = encode(rows, TOKENIZER, options)
    assert whole(example) == "3. Which pub?\nThe cheap one.<|end|>"
    assert with_loss(example) == "The cheap one.<|end|>"


def test_rows_whose_response_is_cut_off_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "The pub " * 20, "a": "far"}, {"q": "The", "a": "near"}]
    options = DataConfig(prompt_template="{q} ", response="a", max_length=12)
    with caplog.at_level("INFO", logger="sylva_compile.cli.sequences"):
        (example,) = encode(rows, TOKENIZER, options)
    assert with_loss(example) == "near<|end|>"
    assert "1 of 2 rows carry no loss in 12 tokens" in caplog.text


def test_an_empty_response_is_left_out() -> None:
    rows = [{"q": "The pub ", "a": ""}, {"q": "The ", "a": None}, {"q": "The", "a": "near"}]
    (example,) = encode(rows, TOKENIZER, DataConfig(prompt_template="{q} ", response="a"))
    assert with_loss(example) == "near<|end|>"


def test_rows_that_are_cut_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sylva_compile.cli.sequences"):
        encode([{"text": "The pub " * 20}, {"text": "near"}], TOKENIZER, DataConfig(column="text", max_length=12))
    assert "1 of 2 rows are cut to 12 tokens" in caplog.text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}, {"other": "b"}], {"column": "text"}, r"Row 2 .*KeyError"),
        ([{"text": ["a"]}], {"column": "text"}, r"Row 1 .*a list where text belongs"),
        ([{"messages": "no list"}], {}, "Row 1 "),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    rows: list[dict[str, object]], options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode(rows, TOKENIZER, DataConfig(**options))


def test_several_processes_hold_out_whole_batches_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [{"input_ids": [at], "attention_mask": [1], "labels": [at]} for at in range(40)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    train, out = hold_out(examples, DataConfig(batch_size=4))
    assert (len(train), len(out)) == (32, 8)


def test_lines_of_json_hold_every_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(read_rows(str(path), "train", None)) == [{"text": "one\u2028two\u0085three"}]


def test_a_table_may_hold_long_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\n" + "a" * 200_000 + "\n")
    (row,) = read_rows(str(path), "train", None)
    assert len(row["text"]) == 200_000


class TestChat:
    """The chat template is used where columns are named for it."""

    def test_messages_as_prompt_and_response(self) -> None:
        row = {"prompt": [{"role": "user", "content": "A?"}], "response": [{"role": "assistant", "content": "Yes."}]}
        (example,) = encode([row], TOKENIZER, DataConfig())
        assert with_loss(example) == "Yes.<|end|>\n"

    def test_an_empty_answer_carries_no_loss(self) -> None:
        said = [("user", "A?"), ("assistant", ""), ("user", "B?"), ("assistant", "No.")]
        messages = [{"role": role, "content": content} for role, content in said]
        (example,) = encode([{"messages": messages}], TOKENIZER, DataConfig())
        assert with_loss(example) == "No.<|end|>\n"

    def test_prompt_and_response(self) -> None:
        (example,) = encode([{"prompt": "Where?", "response": "Near."}], TOKENIZER, DataConfig())
        assert whole(example) == "<|im_start|>user\nWhere?<|end|>\n<|im_start|>assistant\nNear.<|end|>\n"
        assert with_loss(example) == "Near.<|end|>\n"

    def test_turns_of_the_assistant_carry_loss(self) -> None:
        said = [("system", "Be brief."), ("user", "A?"), ("assistant", "Yes."), ("user", "B?"), ("assistant", "No.")]
        messages = [{"role": role, "content": content} for role, content in said]
        (example,) = encode([{"messages": messages}], TOKENIZER, DataConfig())
        assert with_loss(example) == "Yes.<|end|>\nNo.<|end|>\n"
        text = TOKENIZER.apply_chat_template(messages, tokenize=False)
        assert whole(example) == text
        # Another speaker's last turn is not needed: nothing after it carries loss.
        (shorter,) = encode([{"messages": messages[:4]}], TOKENIZER, DataConfig())
        assert with_loss(shorter) == "Yes.<|end|>\n"

    def test_a_tokenizer_without_template(self) -> None:
        with pytest.raises(InputError, match="has no chat template; give --prompt-template"):
            encode([{"prompt": "a", "response": "b"}], make_tokenizer(), DataConfig())

    def test_a_template_that_rewrites_earlier_turns(self) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(InputError, match="changes earlier turns"):
            encode([{"prompt": "a", "response": "b"}], tokenizer, DataConfig())


def test_held_out_sequences_are_whole_batches_and_the_same_again() -> None:
    examples = encode([{"text": f"The pub {k}"} for k in range(30)], TOKENIZER, DataConfig(column="text"))
    train, out = hold_out(examples, DataConfig(batch_size=4, seed=3))
    assert len(out) == 4 and len(train) == 26
    assert hold_out(examples, DataConfig(batch_size=4, seed=3)) == (train, out)
    assert hold_out(examples, DataConfig(batch_size=4, held_out=0.0))[1] == []
    with pytest.raises(InputError, match="gives 30 sequences, and 40 are needed"):
        hold_out(examples, DataConfig(batch_size=20))
    assert [batch["labels"].shape[0] for batch in batches_of(train, 4, most=9)] == [4, 4]


def test_tables_of_every_kind(tmp_path: Path) -> None:
    rows = [{"a": "1", "b": "é"}, {"a": "2", "b": "x\ty"}]
    for name, text in (
        ("t.csv", '\ufeffa,b\n1,é\n2,"x\ty"\n'),
        ("t.json", json.dumps(rows)),
        ("t.jsonl", "\n\n".join(map(json.dumps, rows))),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_rows(str(tmp_path / name), "train", None) == rows
    (tmp_path / "notes").write_text("a\n")
    assert read_rows(str(tmp_path / "notes"), "train", None) == "a\n"
    with pytest.raises(InputError, match="is no file; give a CSV"):
        read_rows("../nothing/here", "train", None)


def test_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if name == "some/other":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/other'\ndoesn't exist")
        return datasets.Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("some/set", "validation", "en")
    assert asked == [("some/set", "en", "validation")]
    assert len(encode(rows, TOKENIZER, DataConfig(column="text"))) == 2
    with pytest.raises(InputError, match="no data set on the hub can be read: Dataset 'some/other' doesn't exist"):
        read_rows("some/other", "train", None)
