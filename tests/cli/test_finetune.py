import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import QUICK, TRAIN, Command, Place
from safetensors.torch import load_file
from tiny_checkpoint import SENTENCES, save_tiny_model
from transformers import AutoModelForCausalLM, TrainerState

import sylva_compile
from sylva_compile.cli.training import StopCallback


def losses(printed: str) -> tuple[float, float]:
    """Return the held-out losses before and after."""
    lines = [line for line in printed.splitlines() if line.startswith("held-out loss")]
    before, after = (float(line.split(": ")[1].split(",")[0]) for line in lines)
    return before, after


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("sylva_adapter-*.safetensors")
    return load_file(file)


class TestTraining:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_it_learns_and_writes_an_adapter(self, kind: str, tmp_path: Path, command: Command, place: Place) -> None:
        model = save_tiny_model(tmp_path / "model", kind)
        out = tmp_path / "adapter"
        found = command(
            *("finetune", "--model", model, "--data", place.table, "--column", "text", "--out", out, *TRAIN)
        )
        assert found.code == 0, found.err
        before, after = losses(found.out)
        assert after < before
        masks = sylva_compile.load_adapter(AutoModelForCausalLM.from_pretrained(model), out)
        assert f"{len(masks)} of {len(masks)} weight gradients rewritten" in found.out
        assert found.out.endswith(f"adapter: {out}\n")

    def test_a_text_and_every_option(self, tmp_path: Path, command: Command, place: Place) -> None:
        (tmp_path / "data.txt").write_text("\n".join(SENTENCES))
        (tmp_path / "options.yaml").write_text("bf16: true\nscope: [q_proj, mlp.up_proj]\nmax_length: 16\n")
        options = "--gradient-checkpointing --gradient-accumulation 2 --method magnitude --save-every 2 --log-every 1"
        arguments = ["--config", tmp_path / "options.yaml", "--data", tmp_path / "data.txt", *options.split()]
        found = command("finetune", "--model", place.model, *TRAIN, *arguments, "--out", tmp_path / "out")
        assert found.code == 0, found.err
        before, after = losses(found.out)
        assert after < before
        assert "step 3 of 4: loss" in found.err
        assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        config = json.loads((tmp_path / "out" / "sylva_adapter.json").read_text())
        assert {entry["dtype"] for entry in config["weights"].values()} == {"bfloat16"}
        assert {name.split(".")[-2] for name in config["weights"]} == {"q_proj", "up_proj"}

    def test_masks_of_a_file(self, tmp_path: Path, command: Command, place: Place) -> None:
        model = AutoModelForCausalLM.from_pretrained(place.model)
        masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.5, block_size=8)
        masks.save(tmp_path / "masks")
        arguments = ["--column", "text", "--masks", tmp_path / "masks", "--out", tmp_path / "out", "--held-out", "0"]
        others = command("finetune", "--model", place.model, "--data", place.table, *TRAIN, *arguments)
        assert others.code == 2 and "--sparsity 0.9 asks for other blocks than those of --masks (0.5)" in others.err
        assert not (tmp_path / "out").exists()
        same = [{"0.9": "0.5"}.get(part, part) for part in TRAIN]
        found = command("finetune", "--model", place.model, "--data", place.table, *same, *arguments)
        assert found.code == 0, found.err
        assert "held-out loss" not in found.out
        trained = sylva_compile.load_adapter(AutoModelForCausalLM.from_pretrained(place.model), tmp_path / "out")
        assert all(trained[name] == mask for name, mask in masks.items())

    def test_masks_of_a_file_move_inside_their_column_budget(
        self, tmp_path: Path, command: Command, place: Place
    ) -> None:
        settings = {"sparsity": 0.9, "block_size": 8, "column_budget": 0.5}
        model = AutoModelForCausalLM.from_pretrained(place.model)
        sylva_compile.trace_and_mask(model, method="random", **settings).save(tmp_path / "masks")
        arguments = ["--column", "text", "--masks", tmp_path / "masks", "--out", tmp_path / "out", "--every", "1"]
        found = command("finetune", "--model", place.model, "--data", place.table, *TRAIN, *arguments)
        assert found.code == 0, found.err
        trained = sylva_compile.load_adapter(AutoModelForCausalLM.from_pretrained(place.model), tmp_path / "out")
        for mask in trained.values():
            assert 2 * len(mask.positions[1].unique()) <= -(-mask.shape[1] // 8)

    def test_prompts_and_answers(self, tmp_path: Path, command: Command, place: Place) -> None:
        rows = [{"question": f"Which {k}?", "answer": sentence} for k, sentence in enumerate(SENTENCES)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        arguments = ["--prompt-template", "{question}\\n", "--response", "answer", "--out", tmp_path / "out"]
        found = command("finetune", "--model", place.model, "--data", tmp_path / "data.jsonl", *TRAIN, *arguments)
        assert found.code == 0, found.err
        before, after = losses(found.out)
        assert after < before


class TestErrors:
    """Errors are one line, exit with 1, and leave nothing."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"--model": "no/such/folder"}, "--model no/such/folder is no folder or GGUF file"),
            ({"--model": "."}, "--model . holds no config.json"),
            ({"--model": "model.gguf"}, "--model model.gguf is no file"),
            ({"--data": "nothing.csv"}, "is no file; give a CSV"),
            ({"--data": "."}, "--data . is a folder"),
            ({"--data": "data.txt"}, "data.txt is a text without columns"),
            ({"--data": "short.csv"}, "gives 1 sequences, and 8 are needed"),
            ({"--data": "empty.csv"}, "is empty"),
            ({"--data": "header.csv"}, "has no rows"),
            ({"--data": "latin.csv"}, "is not UTF-8"),
            ({"--data": "broken.json"}, "is no JSON"),
            ({"--data": "number.json"}, "is no list of objects"),
            ({"--column": "txt"}, "has no column 'txt'; choose --column from number, text"),
            ({"--column": None}, "has several columns; choose --column from number, text"),
            ({"--column": None, "--prompt-template": "{a}", "--response": "text"}, "names 'a', which is no column"),
            ({"--column": None, "--prompt-template": "a", "--response": "b"}, "has no column 'b'; choose --response"),
            ({"--scope": "nothing_proj"}, "nothing_proj"),
            ({"--masks": "nothing"}, "nothing does not exist"),
            ({"--out": "data.txt/adapter"}, "--out data.txt/adapter cannot be made"),
            ({"--out": "full"}, "--out full exists; give another folder"),
            ({"--out": "full", "--resume": ""}, "--out full holds no run to resume"),
        ],
    )
    def test_messages(
        self,
        change: dict[str, str | None],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: Command,
        place: Place,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("data.txt").write_text("some text")
        Path("short.csv").write_text("number,text\n1,The pub\n")
        Path("empty.csv").write_text("")
        Path("header.csv").write_text("number,text\n")
        Path("latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
        Path("broken.json").write_text("[1,")
        Path("number.json").write_text("[1]")
        Path("full").mkdir()
        Path("full/file").touch()
        before = sorted(Path().rglob("*"))
        options: dict[str, str | None] = {"--model": str(place.model), "--data": str(place.table), "--column": "text"}
        arguments = [part for option in (options | change).items() if option[1] is not None for part in option if part]
        found = command("finetune", *TRAIN, *arguments)
        assert found.code == 1
        assert message in found.err and found.err.startswith("error: ") and found.err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before


class TestRuns:
    """A folder holds one run, which is resumed with the same options alone."""

    def arguments(self, place: Place, *more: str) -> list[str]:
        options = ["finetune", "--model", str(place.model), "--data", str(place.table), "--column", "text"]
        return [*options, *TRAIN, "--every", "2", "--optimizer", "muon", "--out", str(place.run), *more]

    def test_a_run_is_not_overwritten(self, command: Command, place: Place) -> None:
        before = tensors_of(place.run)
        found = command(*self.arguments(place))
        assert found.code == 1 and "exists; add --resume to go on with it" in found.err
        assert all(torch.equal(before[name], value) for name, value in tensors_of(place.run).items())

    def test_a_finished_run_is_left_alone(self, command: Command, place: Place) -> None:
        found = command(*self.arguments(place, "--resume", "--save-every", "7"))
        assert found.code == 0 and "This run is finished" in found.out

    def test_other_options_are_another_run(self, command: Command, place: Place) -> None:
        found = command(*self.arguments(place, "--resume", "--lr", "0.5"))
        assert found.code == 1 and "--lr was 0.01 in the run" in found.err and "not 0.5" in found.err


def test_a_missing_accelerate_is_named_before_anything_is_written(
    tmp_path: Path, command: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sylva_compile.cli.finetune.find_spec", lambda name: None)
    out = tmp_path / "out"
    found = command("finetune", "--model", place.model, "--data", place.table, "--column", "text", "--out", out, *TRAIN)
    assert found.code == 1
    assert "pip install accelerate" in found.err and found.err.count("\n") == 1
    assert not out.exists()


def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, command: Command, place: Place) -> None:
    options = ["finetune", "--model", place.model, "--data", place.table, "--column", "text", *QUICK]
    options += [
        "--inner",
        "aot_eager",
        "--lr",
        "1e-2",
        "--steps",
        "24",
        "--log-every",
        "1",
        "--method",
        "magnitude",
        "--every",
        "2",
    ]
    started = subprocess.Popen(
        [sys.executable, "-m", "sylva_compile", *map(str, options), "--out", str(tmp_path / "stopped")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert started.stderr is not None
    for line in started.stderr:
        if line.startswith("step 3 of"):
            started.send_signal(signal.SIGINT)
            break
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 130
    assert "of 24; run the same command with --resume to go on." in said.splitlines()[-1]
    check_that_it_goes_on(options, tmp_path, command)


def test_a_terminated_run_goes_on_exactly(
    tmp_path: Path, command: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["finetune", "--model", place.model, "--data", place.table, "--column", "text", *QUICK, "--bf16"]
    options += [
        "--inner",
        "aot_eager",
        "--lr",
        "1e-2",
        "--steps",
        "6",
        "--log-every",
        "1",
        "--method",
        "random",
        "--optimizer",
        "muon",
    ]

    def terminate(self: StopCallback, args: object, state: TrainerState, *others: object, **kwargs: object) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StopCallback, "on_pre_optimizer_step", terminate)
        stopped = command(*options, "--out", tmp_path / "stopped")
    assert stopped.code == 130, stopped.err
    assert "Interrupted after step 4 of 6" in stopped.out
    check_that_it_goes_on(options, tmp_path, command)


def test_a_second_signal_stops_at_once(
    tmp_path: Path, command: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: StopCallback, args: object, state: TrainerState, *others: object, **kwargs: object) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StopCallback, "on_pre_optimizer_step", interrupt)
    options = ["--model", place.model, "--data", place.table, "--column", "text", "--out", tmp_path / "out"]
    found = command("finetune", *TRAIN, *options, "--method", "random", "--save-every", "1")
    assert found.code == 130
    assert found.err.endswith(
        "error: interrupted inside a step; run the same command with --resume to go on from step 2.\n"
    )


def check_that_it_goes_on(options: list[str | Path], folder: Path, command: Command) -> None:
    """Resume the run in `folder / "stopped"`, and compare it with one that was never interrupted."""
    assert len(list((folder / "stopped").glob("checkpoint-*"))) == 1
    assert not (folder / "stopped" / "sylva_adapter.json").exists()
    torch._dynamo.reset()
    resumed = command(*options, "--out", folder / "stopped", "--resume")
    assert resumed.code == 0, resumed.err
    torch._dynamo.reset()
    whole = command(*options, "--out", folder / "whole")
    assert whole.code == 0, whole.err
    assert "step 3 of" in whole.err and "step 3 of" not in resumed.err
    assert losses(resumed.out) == losses(whole.out)
    expected, found = tensors_of(folder / "whole"), tensors_of(folder / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_interruption_before_training_leaves_nothing(
    tmp_path: Path, command: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("sylva_compile.cli.data.read_rows", interrupt)
    arguments = ["--model", place.model, "--data", place.table, "--out", tmp_path / "out"]
    found = command("finetune", *arguments)
    assert found.code == 130 and found.err == "error: interrupted before the command was done.\n"
    assert not (tmp_path / "out").exists()
