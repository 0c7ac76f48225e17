"""Text generation: splits share no meaning, losses are on references, padding is on the left, metrics are as known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality.grid import Run, Settings
from benchmarks.quality.runner import Runner
from benchmarks.quality.tasks import TASKS, Sizes, TaskError, small_gpt2
from benchmarks.quality.tasks.classification import COLA, SST2
from benchmarks.quality.tasks.e2e import E2E, prompt_of
from benchmarks.quality.tasks.generation import IGNORED, Prompt, Writing, token_loss, write
from benchmarks.quality.tasks.small_gpt2 import Recipe, gather, pretrain, pretrained, train_tokenizer

PLACES = ("Alimentum", "Aromi", "Bibimbap House", "Blue Spice", "Browns Cambridge", "Clowns", "Cocum", "Cotto")
SCOPE = r".*\bh\..*"


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the metrics without METEOR, which takes many seconds to start."""
    found = pytest.importorskip(
        "benchmarks.quality.tasks.metrics", exc_type=ImportError, reason="a library of the bench extra is missing"
    )
    monkeypatch.setattr(found, "java", lambda: None)
    return found


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write meanings with one to three references, in the layout of the real file; models are kept beside them."""
    monkeypatch.setattr(small_gpt2, "CACHE", tmp_path / "pretrained")
    (tmp_path / "e2e").mkdir()
    lines = ["mr,ref"]
    for at, place in enumerate(PLACES):
        for number in range(1 + at % 3):
            lines.append(f'"name[{place}], area[riverside]","{place} is {"very " * number}near the river."')
    (tmp_path / "e2e" / "devset.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def tiny(data: Path, tested: int = 2) -> tuple[E2E, Any]:
    task = E2E(tested=tested, new_tokens=5)
    return task, task.load(data, "tiny", Sizes(train=4, validation=2, extra_test=0, length=200))


class TestE2E:
    def test_meanings_stay_on_one_side_with_all_their_references(self, data: Path) -> None:
        task, found = tiny(data)
        parts = (found.train, found.validation, found.test)
        texts = [{prompt.text for prompt in part.prompts} for part in parts]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
        assert [len(found.train), len(texts[1]), len(texts[2])] == [4, 2, 2]
        whole = {prompt.text: prompt.references for prompt in task.read(data / "e2e" / "devset.csv")}
        assert all(
            whole[prompt.text] == prompt.references for prompt in (*found.validation.prompts, *found.test.prompts)
        )
        _, again = tiny(data)
        assert again.test.prompts == found.test.prompts

    def test_a_meaning_reads_as_fields(self) -> None:
        assert prompt_of("name[Blue Spice], near[Burger King]") == "name: Blue Spice; near: Burger King ->"

    def test_missing_data_is_said_in_a_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(small_gpt2, "CACHE", tmp_path / "pretrained")
        with pytest.raises(TaskError, match="--data"):
            tiny(tmp_path)

    @pytest.mark.parametrize(
        "options", [{"kind": "full"}, {"kind": "lora"}, {"kind": "blocks", "trace": "random"}], ids=lambda o: o["kind"]
    )
    def test_a_run_trains_and_judges(
        self, data: Path, metrics: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(TASKS, "e2e", E2E(tested=2, new_tokens=5))
        settings = Settings(
            model="tiny", scope=SCOPE, train=4, validation=2, epochs=2, batch=2, length=200, sparsity=0.7, block_size=8
        )
        found = Runner(data).do(Run("e2e", options["kind"], options, settings, 1e-2, 0))
        assert set(found["test"]["further"]) == {"NIST", "ROUGE-L", "CIDEr"}
        assert found["head"] == 0
        assert found["steps"] == 4
        assert found["checkpoint_bytes"] > 0
        assert len(found["base"]) == 12
        json.dumps(found)


class TestWriting:
    @staticmethod
    def part(*, decoder_only: bool = True, length: int = 200) -> Writing:
        prompts = [Prompt("a ->", [" b", " c c"]), Prompt("longer than a ->", [" d"])]
        return Writing.encode(prompts, train_tokenizer([], 258), length, decoder_only=decoder_only)

    def test_the_loss_is_on_references_alone(self) -> None:
        part = self.part()
        for at, (asked, answer) in enumerate(part.ids):
            batch = part.batch([at])
            assert batch["labels"][0].tolist() == [IGNORED] * len(asked) + answer
            assert batch["input_ids"][0].tolist() == asked + answer
            assert answer[-1] == part.tokenizer.eos_token_id
        padded = part.batch([0, 2])
        assert bool((padded["labels"][padded["attention_mask"] == 0] == IGNORED).all())

    def test_an_encoder_reads_the_prompt_and_a_decoder_the_reference(self) -> None:
        part = self.part(decoder_only=False)
        batch = part.batch([1])
        assert batch["input_ids"][0].tolist() == part.ids[1][0]
        assert batch["labels"][0].tolist() == part.ids[1][1]

    def test_a_reference_may_take_what_the_prompt_leaves(self) -> None:
        prompt = Prompt("", [" " + "abcdefgh" * 9])
        part = Writing.encode([prompt], train_tokenizer([], 258), 20, decoder_only=True)
        assert part.lengths() == [20]

    def test_what_is_too_long_is_cut(self) -> None:
        part = self.part(length=10)
        assert max(part.lengths()) <= 10
        # The end of the prompt is kept, because it says what is asked.
        assert part.tokenizer.decode(part.ids[2][0]).endswith("->")

    def test_prompts_of_different_lengths_are_continued_as_alone(self) -> None:
        part = self.part()
        model = pretrain(Recipe(layers=1, heads=2, width=32, vocabulary=258, characters=0), part.tokenizer, [])
        with torch.no_grad():
            model.transformer.wte.weight.mul_(20)
        together = write(model, part, 8, new_tokens=6)
        assert together == write(model, part, 1, new_tokens=6)
        assert len(together) == len(part.prompts)

    def test_the_token_loss_counts_first_references(self) -> None:
        part = self.part()
        model = pretrain(Recipe(layers=1, heads=2, width=32, vocabulary=258, characters=0), part.tokenizer, [])
        losses, counts = [], []
        for at in (0, 2):
            batch = part.batch([at])
            logits = model(batch["input_ids"]).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, batch["labels"][0, 1:], reduction="sum").item())
            counts.append(len(part.ids[at][1]))
        assert token_loss(model, part, 8) == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


class TestSmallGpt2:
    def test_a_model_is_made_once(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = pretrained("tiny", data)
        assert (folder / "recipe.json").exists()
        monkeypatch.setattr(small_gpt2, "pretrain", lambda *arguments: pytest.fail("made again"))
        assert pretrained("tiny", data) == folder
        assert [each.name for each in folder.parent.iterdir()] == [folder.name]

    def test_the_text_is_of_the_library_and_the_training_sentences(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = tmp_path / "library"
        library.mkdir()
        (library / "a.py").write_text('"""One two three four five six seven eight nine ten."""\n')
        (library / "b.py").write_text('"""Too short."""\n')
        (library / "c.py").write_text("no python\n")
        monkeypatch.setattr(small_gpt2.sysconfig, "get_path", lambda name: str(library))
        for task, line in ((SST2, "fine film\t1\n"), (COLA, "x\t1\t\tHe ran.\n")):
            (tmp_path / task.train_file).parent.mkdir()
            (tmp_path / task.train_file).write_text(line)
        texts = gather(tmp_path, 1000)
        assert sorted(texts) == ["He ran.", "One two three four five six seven eight nine ten.", "fine film"]
        assert gather(tmp_path, 1000) == texts
        assert len(gather(tmp_path, 1)) == 1

    def test_pre_training_lowers_the_loss(self, capsys: pytest.CaptureFixture[str]) -> None:
        texts = ["the cat sat on the mat and the dog sat on the cat " * 20] * 8
        recipe = Recipe(1, 2, 32, positions=64, vocabulary=270, characters=1, epochs=4, batch=4, learning_rate=1e-2)
        pretrain(recipe, train_tokenizer(texts, 270), texts)
        said = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()]
        assert said[-1] < said[0] - 0.5


class TestMetrics:
    TEXTS = ("the blue spice is near the river .", "clowns is cheap and good for families .")
    REFERENCES = (("the blue spice is near the river .", "it is near the river ."), ("clowns serves cheap food .",))

    def test_the_reference_itself_scores_highest(self, metrics: Any) -> None:
        same = metrics.text_metrics([each[0] for each in self.REFERENCES], self.REFERENCES)
        other = metrics.text_metrics(self.TEXTS, self.REFERENCES)
        assert same["BLEU"] == pytest.approx(100.0)
        assert same["ROUGE-L"] == pytest.approx(100.0)
        assert all(same[name] > other[name] >= 0 for name in same)

    def test_nothing_written_scores_nothing(self, metrics: Any) -> None:
        assert set(metrics.text_metrics(["", ""], self.REFERENCES).values()) == {0.0}

    def test_meteor_is_asked_in_lines_of_words(self, metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        class Meteor:
            def compute_score(self, references: Any, texts: Any) -> tuple[float, list[float]]:
                asked.append((references, texts))
                return 0.25, []

        monkeypatch.setattr(metrics, "java", lambda: "java")
        monkeypatch.setattr(metrics, "_meteor", Meteor)
        found = metrics.text_metrics(["Blue\nSpice, a ||| b."], [["It's Blue."]])
        assert found["METEOR"] == 25.0
        assert asked == [({0: ["it's blue ."]}, {0: ["blue spice , a | | | b ."]})]
