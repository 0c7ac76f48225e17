"""Trainings by TRL's SFTTrainer and DPOTrainer, stopped half-way and resumed."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from interrupted import Setting, assert_same, masks_of
from quantised_models import needs_bitsandbytes, quantise, quiet
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sylva_compile
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.integrations import BlocksCallback, BlocksTrainerMixin
from sylva_compile.schedules import MovingBlocks, ScheduleCallback

pytest.importorskip("trl")
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# TRL calls names of gradient checkpointing that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

STEPS, STOP = 4, 2
BF16 = torch.bfloat16
TOKENIZER = tiny_tokenizer()
NUMBERS = range(24)
TEXTS = {"text": [f"{k} and {k + 1}" * (1 + k % 3) for k in NUMBERS]}
PAIRS = {
    "prompt": [f"after {k} " for k in NUMBERS],
    "chosen": [f"comes {k + 1}" for k in NUMBERS],
    "rejected": [f"comes {k}" for k in NUMBERS],
}


class BlocksSFTTrainer(BlocksTrainerMixin, SFTTrainer):
    """What a user writes."""


class BlocksDPOTrainer(BlocksTrainerMixin, DPOTrainer):
    """What a user writes."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    # TRL reports what it is used for, unless it runs under a CI.
    monkeypatch.setenv("CI", "1")


def model_of(setting: Setting) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENIZER),
        attention_dropout=setting.dropout,
        bos_token_id=None,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return LlamaForCausalLM(config).to(setting.dtype).requires_grad_(False)


def arguments(directory: Path, setting: Setting) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "warmup_steps": 2,
        "save_steps": STOP,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        **setting.arguments,
    }


def prepared(setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
    """Return an embedded model and the arguments that trainers of both kinds take."""
    model = model_of(setting)
    masks = masks_of(model, setting)
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.01)
    callbacks = [ScheduleCallback(MovingBlocks(masks, every=2))] if setting.schedule == "moving" else []
    if setting.compiled:
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
    common = {"callbacks": callbacks, "optimizers": (optimizer, None), "processing_class": TOKENIZER}
    return model, common


def supervised(directory: Path, setting: Setting) -> Any:
    model, common = prepared(setting)
    args = SFTConfig(**arguments(directory, setting))
    return BlocksSFTTrainer(model, args, train_dataset=Dataset.from_dict(TEXTS), **common)


def preferences(directory: Path, setting: Setting) -> Any:
    model, common = prepared(setting)
    args = DPOConfig(**arguments(directory, setting))
    reference = None if args.precompute_ref_log_probs else copy.deepcopy(model)
    return BlocksDPOTrainer(model, reference, args, train_dataset=Dataset.from_dict(PAIRS), **common)


CASES: dict[str, tuple[Callable[[Path, Setting], Any], Setting]] = {
    "SFT": (supervised, Setting(dropout=0.2)),
    "SFT, moving, bfloat16": (supervised, Setting(schedule="moving", dtype=BF16, dropout=0.2)),
    "SFT, packed": (supervised, Setting(arguments={"packing": True, "max_length": 24, "packing_strategy": "wrapped"})),
    "SFT, padding-free": (supervised, Setting(arguments={"padding_free": True, "max_length": None})),
    "DPO, a copy as reference": (preferences, Setting(schedule="moving", dtype=BF16)),
    "DPO, log-probabilities kept": (preferences, Setting(arguments={"precompute_ref_log_probs": True})),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    make, setting = CASES[name]
    once = make(tmp_path, setting)
    before = copy.deepcopy(once.model.state_dict())
    once.train()
    assert not all(torch.equal(value, before[key]) for key, value in once.model.state_dict().items())
    assert not list(tmp_path.glob("checkpoint-*/model*"))
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    again = make(tmp_path, setting)
    torch.rand(7)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(once)
    assert len(losses(once)) == STEPS
    assert_same(again.model, once.model)
    assert (tmp_path / f"checkpoint-{STOP}" / "tokenizer.json").is_file()


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_copy_as_reference_stays_as_it_was(tmp_path: Path) -> None:
    trainer = preferences(tmp_path, Setting(schedule="moving"))
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()
    reference = trainer.ref_model.state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in before.items())
    # The reference is as the policy was before training, so the first loss is log 2.
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)


def test_without_a_reference_trl_loads_the_base_again(tmp_path: Path) -> None:
    """TRL copies nothing: it loads the model that the configuration names, which is the base, without blocks."""
    setting = Setting(dtype=BF16)
    model_of(setting).save_pretrained(tmp_path / "base")
    model, common = prepared(setting)
    model.config._name_or_path = str(tmp_path / "base")
    args = DPOConfig(**arguments(tmp_path / "out", setting))
    trainer = BlocksDPOTrainer(model, None, args, train_dataset=Dataset.from_dict(PAIRS), **common)
    assert not [name for name, _ in trainer.ref_model.named_parameters() if "blocks" in name]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_a_reference_that_is_synced_must_have_blocks(tmp_path: Path) -> None:
    setting = Setting(arguments={"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0})
    model, common = prepared(setting)
    args = DPOConfig(**arguments(tmp_path, setting))
    data = Dataset.from_dict(PAIRS)
    with pytest.raises(ArgumentError, match=r"sync_ref_model=True .* the reference model has no blocks; leave it out"):
        BlocksDPOTrainer(model, model_of(setting), args, train_dataset=data, **common)
    trainer = preferences(tmp_path, setting)
    trainer.train()
    theirs, ours = trainer.ref_model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_model_compiled_in_place_trains_as_uncompiled(tmp_path: Path) -> None:
    one_shape = {"packing": True, "max_length": 24, "packing_strategy": "wrapped", "gradient_checkpointing": False}
    args = {**one_shape, "max_steps": 2, "save_strategy": "no"}
    expected = supervised(tmp_path, Setting(layers=1, arguments=args))
    expected.train()
    found = supervised(tmp_path, Setting(layers=1, arguments=args, compiled=True))
    found.train()
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def test_an_ordinary_trainer_of_trl_takes_the_callback(tmp_path: Path) -> None:
    setting = Setting(dtype=BF16)

    def make() -> Any:
        model, common = prepared(setting)
        common["callbacks"] = [BlocksCallback()]
        args = SFTConfig(**arguments(tmp_path, setting))
        return SFTTrainer(model, args, train_dataset=Dataset.from_dict(TEXTS), **common)

    once = make()
    once.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert losses(again) == losses(once)
    assert_same(again.model, once.model)


@needs_bitsandbytes
@quiet
def test_blocks_in_a_quantised_model_stay_wide(tmp_path: Path) -> None:
    model = quantise(model_of(Setting()), "nf4")
    # As from_pretrained notes it, by which TRL tells quantised models.
    model.is_quantized = model.is_loaded_in_4bit = True
    masks = masks_of(model, Setting())
    masks.embed(model)
    before = [blocks.detach().clone() for blocks in masks.parameters()]
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-5)
    trainer = BlocksSFTTrainer(
        model,
        SFTConfig(**arguments(tmp_path, Setting())),
        train_dataset=Dataset.from_dict(TEXTS),
        processing_class=TOKENIZER,
        optimizers=(optimizer, None),
    )
    assert all(map(torch.equal, masks.parameters(), before))
    trainer.train()
    moved = sum(int((new != old).sum()) for new, old in zip(masks.parameters(), before, strict=True))
    assert moved > 0.9 * sum(blocks.numel() for blocks in before)


def test_blocks_that_were_made_narrow_are_not_stepped() -> None:
    model = model_of(Setting())
    masks = masks_of(model, Setting())
    masks.embed(model)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    for blocks in masks.parameters():
        blocks.data = blocks.data.to(BF16)
    with pytest.raises(EmbedError, match=r"were made torch\.bfloat16 by an assignment to `\.data`.*BlocksTrainerMixin"):
        optimizer.step()
