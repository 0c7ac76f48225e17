"""Trainings by transformers' Trainer with `BlocksTrainerMixin`, stopped half-way and resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import STEPS, STOP, BlocksTrainer, Setting, assert_same, base, make, masks_of, values
from quantised_models import needs_bitsandbytes, quiet
from transformers import Trainer

import sylva_compile
from sylva_compile.errors import AdapterError, ArgumentError
from sylva_compile.integrations import BlocksTrainerMixin
from sylva_compile.schedules import MovingBlocks, ScheduleCallback

HEAD = ("lm_head.weight", "model.norm.weight")
BF16 = torch.bfloat16
SETTINGS = {
    "fixed": Setting(),
    "fixed bfloat16": Setting(dtype=BF16, dropout=0.2),
    "moving": Setting(schedule="moving", dropout=0.2),
    "moving bfloat16": Setting(schedule="moving", dtype=BF16),
    "layers": Setting(schedule="layers", dtype=BF16),
    "head and dropout": Setting(trained=HEAD, dropout=0.2, dtype=BF16),
    "moving, head": Setting(schedule="moving", trained=HEAD, dtype=BF16, arguments={"gradient_accumulation_steps": 2}),
    "torch's optimizer": Setting(schedule="moving", optimizer="torch", dtype=BF16, trained=HEAD),
    "the Trainer's optimizer": Setting(optimizer="trainer", dtype=BF16, trained=HEAD),
    "compiled in place": Setting(compiled=True, layers=1, schedule="moving", dtype=BF16),
    "gpt2": Setting(architecture="gpt2", dtype=BF16, trained=("transformer.wpe.weight",)),
    "a tied head": Setting(architecture="gpt2", schedule="moving", trained=("lm_head.weight",)),
    "quantised": Setting(quantised="nf4-double", dtype=BF16, trained=HEAD),
    "quantised, moving": Setting(quantised="nf4", schedule="moving"),
    "in the second epoch": Setting(samples=8, dropout=0.2, arguments={"save_steps": 5}),
}


QUANTISED = ("quantised", "quantised, moving")


@quiet
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_bitsandbytes) if name in QUANTISED else name for name in SETTINGS]
)
def test_a_resumed_training_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    once = make(tmp_path, setting)
    untrained = values(once.model)
    once.trainer.train()
    assert not all(torch.equal(value, untrained[key]) for key, value in values(once.model).items())
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}", ignore_errors=True)
    again = make(tmp_path, setting)
    # Another process may have drawn more random numbers by now.
    torch.rand(7)
    again.trainer.train(resume_from_checkpoint=True)
    assert again.losses() == once.losses()
    assert len(once.losses()) == STEPS
    assert_same(again.model, once.model)
    if setting.schedule == "moving":
        assert once.schedule.moves == again.schedule.moves == STEPS // 2
        assert dict(again.masks) == dict(once.masks)
    if not setting.trained:
        sylva_compile.unload_adapter(again.model)
        kept = again.model.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in base(setting).model.state_dict().items())


def test_a_checkpoint_holds_the_adapter_and_no_dense_model(tmp_path: Path) -> None:
    made = make(tmp_path, Setting(schedule="moving"))
    made.trainer.train()
    names = {path.name for path in (tmp_path / f"checkpoint-{STOP}").iterdir()}
    assert not [name for name in names if name.startswith(("model", "pytorch_model", "tmp-"))]
    adapters = {name for name in names if name.startswith("sylva_adapter")}
    others = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert names == adapters | others | {"sylva_schedules.pt"}
    assert len(adapters) == 2
    states = torch.load(tmp_path / f"checkpoint-{STOP}" / "sylva_schedules.pt", weights_only=True)
    assert all(entry == {"cycle": None} for entry in states[0]["weights"].values())
    fresh = base(Setting()).model
    sylva_compile.load_adapter(fresh, tmp_path / f"checkpoint-{STEPS}")
    assert_same(fresh, made.model)


@pytest.mark.parametrize("schedule", [None, "moving"])
def test_the_best_blocks_come_back(schedule: str | None, tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    arguments = {**best, "metric_for_best_model": "worse", "greater_is_better": False}
    setting = Setting(schedule=schedule, dtype=BF16, trained=HEAD, arguments=arguments)
    made = make(tmp_path, setting, Worsening)
    made.trainer.train()
    assert made.trainer.state.best_global_step == 3
    stopped = make(
        tmp_path / "stopped", Setting(schedule=schedule, dtype=BF16, trained=HEAD, arguments={"warmup_steps": 2})
    )
    stopped.trainer.add_callback(StopAt(3))
    stopped.trainer.train()
    assert_same(made.model, stopped.model)
    assert dict(made.masks) == dict(stopped.masks)


class Worsening(BlocksTrainer):
    """Its evaluations are best at the third step."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_worse": float(abs(self.state.global_step - 3))}


class StopAt(ScheduleCallback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path: Path) -> None:
    arguments = {"save_steps": 1, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "worse", "greater_is_better": False}
    made = make(tmp_path, Setting(arguments=arguments | best), Worsening)
    made.trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_saving_the_model_writes_the_adapter_and_merging_gives_the_dense_one(tmp_path: Path) -> None:
    made = make(tmp_path / "out", Setting(trained=HEAD))
    made.trainer.train()
    made.trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "sylva_adapter.json").is_file()
    assert not list((tmp_path / "adapter").glob("model*"))
    fresh = base(Setting()).model
    sylva_compile.load_adapter(fresh, tmp_path / "adapter")
    state: Any = made.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())
    sylva_compile.merge_and_unload(made.trainer.model)
    made.trainer.save_model(str(tmp_path / "dense"))
    dense = type(made.model).from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in state.items())


def test_what_is_pushed_while_training_holds_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, Setting())
    made.trainer.train()
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(folder))
    made.trainer._push_from_checkpoint(str(tmp_path / f"checkpoint-{STEPS}"))
    assert len(pushed) == 1
    fresh = base(Setting()).model
    sylva_compile.load_adapter(fresh, tmp_path)
    assert_same(fresh, made.model)


class TestRefusals:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        made = make(tmp_path, Setting())
        made.trainer.train()
        return tmp_path / f"checkpoint-{STOP}"

    def refused(self, checkpoint: Path | bool, setting: Setting, words: str, *, spoiled: str = "") -> None:
        made = make(checkpoint.parent if isinstance(checkpoint, Path) else Path(), setting)
        if spoiled:
            with torch.no_grad():
                made.model.get_parameter(spoiled)[0].mul_(2)
            if ".q_proj" in spoiled:
                made.model.load_state_dict(made.model.state_dict())
        before = values(made.model)
        with pytest.raises((AdapterError, ArgumentError), match=words) as caught:
            made.trainer.train(resume_from_checkpoint=str(checkpoint))
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in values(made.model).items())

    def test_other_checkpoints(self, checkpoint: Path) -> None:
        self.refused(checkpoint, Setting(masks_seed=1), "other masks: the blocks of .* lie elsewhere; embed the masks")
        self.refused(checkpoint, Setting(sparsity=0.5), "other masks: .* blocks of 8 there and .* here")
        self.refused(
            checkpoint, Setting(trained=HEAD), r"model\.norm\.weight requires grad and is not in .*checkpoint-3"
        )
        self.refused(checkpoint, Setting(dtype=BF16), "another base: .* frozen weights differ")
        self.refused(checkpoint, Setting(schedule="layers"), "the states of 0 schedules, and this Trainer has 1")

    def test_another_base(self, checkpoint: Path) -> None:
        words = "another base: 1 frozen weights differ, model.norm.weight first"
        self.refused(checkpoint, Setting(), words, spoiled="model.norm.weight")
        where = "model.layers.0.self_attn.q_proj.weight"
        self.refused(checkpoint, Setting(), "another base: .*q_proj", spoiled=where)

    def test_a_checkpoint_without_its_adapter(self, checkpoint: Path) -> None:
        (checkpoint / "sylva_adapter.json").unlink()
        self.refused(checkpoint, Setting(), "holds no adapter")
        self.refused(checkpoint.parent / "missing", Setting(), "holds no adapter")

    def test_a_schedule_that_is_missing(self, tmp_path: Path) -> None:
        make(tmp_path, Setting(schedule="layers")).trainer.train()
        made = make(tmp_path, Setting())
        with pytest.raises(ArgumentError, match=r"states of 1 schedules, and this Trainer has 0; give callbacks="):
            made.trainer.train(resume_from_checkpoint=True)

    def test_a_model_without_blocks(self, tmp_path: Path) -> None:
        made = make(tmp_path, Setting())
        sylva_compile.unload_adapter(made.model)
        with pytest.raises(ArgumentError, match="carries no blocks"):
            made.trainer.train()

    def test_a_class_that_names_the_trainer_first(self) -> None:
        with pytest.raises(ArgumentError, match="Wrong names a Trainer first; name BlocksTrainerMixin before it"):
            type("Wrong", (Trainer, BlocksTrainerMixin), {})
        type("Right", (BlocksTrainer, Trainer), {})

    def test_a_checkpoint_of_the_model_only(self, tmp_path: Path) -> None:
        setting = Setting(schedule="layers", arguments={"save_only_model": True})
        make(tmp_path, setting).trainer.train()
        names = {path.name for path in (tmp_path / "checkpoint-3").iterdir() if "adapter" not in path.name}
        assert names == {"trainer_state.json", "training_args.bin"}
        self.refused(tmp_path / "checkpoint-3", Setting(), r"no optimizer\.pt \(save_only_model=True\?\)")


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, Setting()).trainer.train()
    last = tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"
    last.write_text(last.read_text()[:40])
    made = make(tmp_path, Setting())
    with pytest.raises(AdapterError, match="was not written to its end"):
        made.trainer.train(resume_from_checkpoint=str(last.parent))
    made.trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 was not written to its end" in caplog.text
    assert json.loads(last.read_text())["global_step"] == STEPS
    with pytest.raises(AdapterError, match="holds no whole checkpoint"):
        make(tmp_path / "elsewhere", Setting()).trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_run_that_another_began_to_write_over(tmp_path: Path) -> None:
    class Dies(BlocksTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            raise KeyboardInterrupt

    make(tmp_path, Setting(optimizer="torch")).trainer.train()
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    setting = Setting(optimizer="torch", arguments={"seed": 5})
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, setting, Dies).trainer.train()
    with pytest.raises(AdapterError, match="holds no whole checkpoint"):
        make(tmp_path, setting).trainer.train(resume_from_checkpoint=True)


def test_a_crash_while_writing_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, Setting())
    save = torch.save

    def crash(value: Any, path: Any, *args: Any) -> None:
        save(value, path, *args)
        if "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        made.trainer.train()
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert not names & {"optimizer.pt", "trainer_state.json"}
    assert not [name for name in names if name.startswith("tmp-")]


def test_buffers_are_kept_and_may_hold_infinity(tmp_path: Path) -> None:
    made = make(tmp_path, Setting())
    made.model.register_buffer("seen", torch.full((2,), -torch.inf))
    made.trainer.train()
    made.model.seen.zero_()
    made.trainer.train(resume_from_checkpoint=True)
    assert made.model.seen.isneginf().all()
    made.model.seen.fill_(torch.nan)
    with pytest.raises(AdapterError, match="seen holds NaN"):
        made.trainer.save_model()


class TestCompiling:
    """Accelerate would compile a model with a backend that knows no blocks, on top of one that does."""

    @pytest.mark.parametrize("trainer", [BlocksTrainer, Trainer])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_second_compiler_is_refused(self, trainer: type, compiled: bool, tmp_path: Path) -> None:
        setting = Setting(compiled=compiled, arguments={"torch_compile": True})
        callbacks = [sylva_compile.integrations.BlocksCallback()]
        with pytest.raises(
            ArgumentError, match=r"call model\.compile\(backend=sylva_compile\.backend\(masks\)\)"
        ) as caught:
            make(tmp_path, setting, trainer, callbacks=callbacks)
        assert "\n" not in str(caught.value)

    def test_the_name_of_our_backend_is_explained(self, tmp_path: Path) -> None:
        setting = Setting(arguments={"torch_compile": True, "torch_compile_backend": "sylva"})
        with pytest.raises(
            ArgumentError, match=r"torch_compile_backend='sylva'.*accelerate does not know blocks; leave"
        ):
            make(tmp_path, setting)


def test_one_trainer_goes_back_and_trains_again(tmp_path: Path) -> None:
    made = make(tmp_path, Setting(schedule="moving", dtype=BF16, trained=HEAD))
    made.trainer.train()
    then = values(made.model)
    made.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert all(torch.equal(value, then[name]) for name, value in values(made.model).items())


class MovesOnce:
    """A schedule of a user's own, which moves blocks after the second step; its state holds no values."""

    def __init__(self, masks: sylva_compile.Masks) -> None:
        self.masks, self.steps = masks, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == 2:
            for parameter in self.masks.parameters():
                parameter.grad = None
            turned = {name: mask.block_map().flip(0) for name, mask in self.masks.items()}
            new = {
                name: sylva_compile.BlockMask.from_block_map(turned[name], mask.shape, mask.block_size)
                for name, mask in self.masks.items()
            }
            self.masks.move(new)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_schedule_of_the_users_own(tmp_path: Path) -> None:
    def new() -> Any:
        made = make(tmp_path, Setting(dtype=BF16))
        made.trainer.add_callback(ScheduleCallback(MovesOnce(made.masks)))
        return made

    once, again = new(), new()
    once.trainer.train()
    again.trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert again.losses() == once.losses()
    assert_same(again.model, once.model)
    assert dict(again.masks) == dict(once.masks)


def test_a_masks_object_and_a_schedule_follow_a_resume_by_path(tmp_path: Path) -> None:
    setting = Setting(schedule="moving")
    make(tmp_path / "one", setting).trainer.train()
    again = make(tmp_path / "other", setting)
    assert isinstance(again.schedule, MovingBlocks)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{STOP}"))
    again.schedule.move()
    assert masks_of(base(setting).model, setting) != again.masks
