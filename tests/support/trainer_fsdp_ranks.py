"""One of two processes that train by a Trainer under FSDP2: `trainer_fsdp_ranks.py RANK DIRECTORY PORT`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from interrupted import STEPS, STOP, BlocksTrainer, Made, Setting, base, make
from like_torchrun import one_of_several, shard_on_the_cpu
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

import sylva_compile
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.shards import is_sharded
from sylva_compile.errors import ArgumentError
from sylva_compile.integrations import BlocksCallback
from sylva_compile.optim import AdamW, Muon
from sylva_compile.schedules import MovingBlocks

HEAD = ("lm_head.weight", "model.norm.weight")
BF16 = torch.bfloat16
CLIPPED = {"max_grad_norm": 0.1}
SETTINGS = {
    "the Trainer's optimizer": Setting(trained=HEAD, arguments={**CLIPPED, "gradient_accumulation_steps": 2}),
    "moving": Setting(schedule="moving", arguments=CLIPPED),
    "moving bfloat16": Setting(schedule="moving", dtype=BF16, dropout=0.2),
    "layers": Setting(schedule="layers"),
    "checkpointed": Setting(compiled=True, layers=1),
    "Muon": Setting(),
}
EXACT = {name: setting for name, setting in SETTINGS.items() if setting.dtype == torch.float32}
"""Those that equal a training by one process on joint batches up to rounding."""


class Worsening(BlocksTrainer):
    """Its evaluations are best at the third step."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_worse": float(abs(self.state.global_step - STOP))}


def options_of(name: str) -> dict[str, Any]:
    """Return the Trainer's argument that makes the optimizer."""
    if name == "Muon":
        return {"optimizer_cls_and_kwargs": (Muon, {"lr": 0.01})}
    return {} if "the Trainer" in name else {"optimizer_cls_and_kwargs": (AdamW, {"lr": 0.01})}


def made(directory: Path, name: str, setting: Setting, kind: type = BlocksTrainer, **more: Any) -> Made:
    """Make a training under FSDP2, with batches of half the size on each process."""
    config = {"version": 2, "activation_checkpointing": name == "checkpointed", **more.pop("config", {})}
    arguments = {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo", **setting.arguments}
    return make(directory, replace(setting, optimizer="trainer", arguments=arguments), kind, **more)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return all values of a sharded model; they are empty on every process but the first."""
    for state in block_states(model).values():
        assert is_sharded(state.weight) and is_sharded(state.blocks) and state.is_synced(), state.name
    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in found.items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def stopped_and_resumed(directory: Path, name: str) -> None:
    """A training that stops and goes on is the one that never stopped; all of its values are kept for other tests."""
    setting = SETTINGS[name]
    once, again = (made(directory / name, name, setting, **options_of(name)) for _ in range(2))
    once.trainer.train()
    torch.rand(7)
    again.trainer.train(resume_from_checkpoint=str(directory / name / f"checkpoint-{STOP}"))
    assert again.losses() == once.losses() and len(once.losses()) == STEPS, name
    trained = values(once.model)
    assert_equal(values(again.model), trained)
    assert dict(again.masks) == dict(once.masks)
    if dist.get_rank() == 0:
        torch.save(trained, directory / name / "trained.pt")


def goes_on_from_one_process(directory: Path) -> None:
    """Checkpoints are those of one process."""
    here = made(directory / "here", "moving", SETTINGS["moving"], **options_of("moving"))
    here.trainer.train(resume_from_checkpoint=str(directory / "alone" / "moving" / f"checkpoint-{STOP}"))
    found = values(here.model)
    if dist.get_rank() == 0:
        assert difference(found, torch.load(directory / "moving" / "trained.pt")) < 1e-5


def goes_back(directory: Path) -> None:
    """One Trainer trains twice; the second time it begins at a checkpoint of the first."""
    here = made(directory / "back", "moving", SETTINGS["moving"], **options_of("moving"))
    here.trainer.train()
    then = values(here.model)
    here.trainer.train(resume_from_checkpoint=str(directory / "back" / f"checkpoint-{STOP}"))
    assert_equal(values(here.model), then)


def evaluates(directory: Path) -> None:
    """Evaluations gather weights and leave some gathered; the best blocks and the best head come back nevertheless."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "worse", "greater_is_better": False}
    setting = Setting(trained=HEAD, schedule="moving", dtype=BF16, arguments=best)
    here = made(directory / "best", "best", setting, Worsening, **options_of("best"))
    here.trainer.train()
    assert here.trainer.state.best_global_step == STOP
    found, loss = values(here.model), here.trainer.evaluate()["eval_loss"]
    fresh = base(setting).model
    sylva_compile.load_adapter(fresh, directory / "best" / f"checkpoint-{STOP}")
    if dist.get_rank() == 0:
        assert_equal(dict(fresh.state_dict()), found)
    # The weights are gathered now: what disable_adapter writes must reach the next pass, and what it puts back too.
    with torch.no_grad(), sylva_compile.disable_adapter(here.model):
        assert here.trainer.evaluate()["eval_loss"] != loss
    assert here.trainer.evaluate()["eval_loss"] == loss
    words = here.model.generate(here.case.batch["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(fresh.generate(here.case.batch["input_ids"], max_new_tokens=6, do_sample=False), words)
    here.trainer.save_model(str(directory / "saved"))
    sylva_compile.load_adapter(again := base(setting).model, directory / "saved")
    assert_equal(dict(again.state_dict()), dict(fresh.state_dict()))
    sylva_compile.unload_adapter(here.model)
    found, untrained = values(here.model), dict(base(setting).model.state_dict())
    if dist.get_rank() == 0:
        # What was trained beside the blocks has no base; loading the best checkpoint kept the last values of training.
        assert_equal({name: found[name] for name in here.masks}, {name: untrained[name] for name in here.masks})


def ordinary_trainer(directory: Path) -> None:
    """Without the mixin, the Trainer saves the dense model, and the callback what that lacks."""
    setting, kept = Setting(schedule="moving", dtype=BF16), {"state_dict_type": "SHARDED_STATE_DICT"}
    once, again = (
        made(directory / "dense", "dense", setting, Trainer, callbacks=[], config=kept, **options_of("dense"))
        for _ in range(2)
    )
    for each in (once, again):
        each.trainer.add_callback(BlocksCallback(each.schedule))
    once.trainer.train()
    again.trainer.train(resume_from_checkpoint=str(directory / "dense" / f"checkpoint-{STOP}"))
    assert again.losses() == once.losses() and len(once.losses()) == STEPS
    assert_equal(values(again.model), values(once.model))


def refusals(directory: Path) -> None:
    """Nothing has changed after an error."""

    def refused(words: str, setting: Setting, **more: Any) -> None:
        with pytest.raises(ArgumentError, match=words) as caught:
            made(directory / "refused", "refused", setting, **more)
        assert "\n" not in str(caught.value)
        AcceleratorState._reset_state(reset_partial_state=True)

    refused(r"fsdp_config=\{'version': 2\}", Setting(), config={"version": 1, "sync_module_states": False})
    refused("cpu_ram_efficient_loading to False", Setting(), config={"cpu_ram_efficient_loading": True})
    refused("save_on_each_node=True", Setting(arguments={"save_on_each_node": True}), **options_of("ours"))
    plain = Setting(optimizer="ours", arguments={"fsdp": True, "fsdp_config": {"version": 2}, "ddp_backend": "gloo"})
    with pytest.raises(ArgumentError, match=r"give optimizer_cls_and_kwargs=\(sylva_compile"):
        make(directory / "refused", plain)
    moving = made(directory / "refused", "refused", Setting(), Trainer, callbacks=[], **options_of("ours"))
    schedule = MovingBlocks(moving.masks, every=1, carry="intersection")
    moving.trainer.add_callback(BlocksCallback(schedule))
    with pytest.raises(ArgumentError, match="lose the age of each block, which carry='intersection' needs"):
        moving.trainer.train()


def main(directory: Path) -> None:
    for name in SETTINGS:
        stopped_and_resumed(directory, name)
    goes_on_from_one_process(directory)
    goes_back(directory)
    evaluates(directory)
    ordinary_trainer(directory)
    refusals(directory)


if __name__ == "__main__":
    number, folder, port = sys.argv[1:]
    with one_of_several(number, port):
        shard_on_the_cpu()
        main(Path(folder))
