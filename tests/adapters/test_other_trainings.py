"""Adapters and training states of other bases, layouts or trainings are refused; what fails half way leaves no half."""

import copy
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from out_of_memory import run_out_at
from quantised_models import quantise
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.adapters import format as adapter_format
from sylva_compile.adapters.format import CONFIG_NAME
from sylva_compile.adapters.resuming import load_training, save_training
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.errors import AdapterError, EmbedError, ScopeError
from sylva_compile.quantised.registry import shape_of

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)).requires_grad_(
        False
    )


def embedded(model: nn.Module, names: tuple[str, ...] = ("0.weight", "2.weight"), seed: int = 0) -> Masks:
    generator, maps = torch.Generator().manual_seed(seed), {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        rows, columns = shape_of(weights[name])
        chosen = torch.zeros(rows // 16 * (columns // 16), dtype=torch.bool)
        chosen[torch.randperm(len(chosen), generator=generator)[:3]] = True
        maps[name] = chosen.view(rows // 16, columns // 16)
    masks = Masks.from_block_maps(model, maps, 16)
    masks.embed(model)
    return masks


def train(model: nn.Module, parameters: list[nn.Parameter], rate: float = 0.1) -> None:
    optimizer = torch.optim.SGD(parameters, lr=rate)
    for step in range(2):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(seed: int = 0) -> nn.Sequential:
    model = net()
    train(model, embedded(model, seed=seed).parameters())
    return model


def on_top_of_a_head(adapter: Path) -> nn.Sequential:
    """Write an adapter that holds the head whole, and train blocks on top of it."""
    first = net()
    masks = embedded(first)
    train(first, [*masks.parameters(), *first[4].requires_grad_().parameters()])
    sylva_compile.save_adapter(first, adapter, modules_to_save=["4"])
    model = net()
    train(model, sylva_compile.load_adapter(model, adapter).parameters())
    return model


def test_a_training_on_top_of_an_adapter_with_a_head_goes_on_with_that_head(tmp_path: Path) -> None:
    model = on_top_of_a_head(tmp_path / "first")
    wanted = model(X)
    save_training(model, tmp_path / "state")
    again = net()
    sylva_compile.load_adapter(again, tmp_path / "first")
    for each in (again, model):
        load_training(each, tmp_path / "state")
        assert torch.equal(each(X), wanted)
    sylva_compile.unload_adapter(again)
    assert torch.equal(again(X), net()(X))


def test_the_base_of_a_resumed_training_is_that_of_the_undisturbed_one(tmp_path: Path) -> None:
    def started() -> tuple[nn.Sequential, Masks]:
        model = net()
        masks = embedded(model)
        model[4].requires_grad_()
        return model, masks

    model, masks = started()
    train(model, [*masks.parameters(), *model[4].parameters()])
    save_training(model, tmp_path)
    again, _ = started()
    load_training(again, tmp_path)
    shown = []
    for each in (model, again):
        with sylva_compile.disable_adapter(each):
            shown.append(each(X))
    assert torch.equal(*shown)


class Tied(nn.Module):
    """Two layers with equal weights, which may be one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.two.load_state_dict(self.one.state_dict())
        if tied:
            self.two.weight = self.one.weight
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu())
        return out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_one_in_training_alone(tied: bool, tmp_path: Path) -> None:
    model, other = Tied(tied), Tied(not tied)
    train(model, embedded(model, ("one.weight",)).parameters())
    sylva_compile.save_adapter(model, tmp_path / "adapter")
    dcp.save({"blocks": sylva_compile.blocks_state(model)}, checkpoint_id=tmp_path / "state")
    with pytest.raises(AdapterError, match=r"one\.weight shared with .*tie the weights as in that training"):
        sylva_compile.load_adapter(other, tmp_path / "adapter")
    embedded(other, ("one.weight",))
    with pytest.raises(Exception, match="tie the weights as in that training"):
        dcp.load({"blocks": sylva_compile.blocks_state(other)}, checkpoint_id=tmp_path / "state")
    same = Tied(tied)
    sylva_compile.load_adapter(same, tmp_path / "adapter")
    assert torch.equal(same(X), model(X))


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "torchao-int8"])
def test_packed_weights_with_other_scales(kind: str, tmp_path: Path) -> None:
    def base(scale: float) -> nn.Module:
        model = net()
        model[2].weight.mul_(scale)
        return quantise(model, kind)

    model = base(1.0)
    train(model, embedded(model, ("0.weight",)).parameters())
    save_training(model, tmp_path)
    other = base(2.0)
    embedded(other, ("0.weight",))
    with pytest.raises(AdapterError, match="frozen weights differ"):
        load_training(other, tmp_path)
    same = base(1.0)
    embedded(same, ("0.weight",))
    load_training(same, tmp_path)
    assert torch.equal(same(X), model(X))


def test_inputs_that_torchao_scales() -> None:
    model = quantise(net(), "torchao-int8")
    model[0].weight.act_pre_scale = torch.rand(32) + 0.5
    with pytest.raises(ScopeError, match="quantises its inputs too, or scales them"):
        embedded(model)


NEW_PROCESS = """
import sys
import torch
import sylva_compile
from sylva_compile.errors import AdapterError

folder, phase = sys.argv[1:]
if phase == "first":
    model = torch.load(folder + "/base.pt", weights_only=False)
    for name in ("one", "two"):
        sylva_compile.load_adapter(model, folder + "/" + name, name)
    torch.save(model, folder + "/model.pt")
else:
    model = torch.load(folder + "/model.pt", weights_only=False)
    model.load_state_dict(torch.load(folder + "/other.pt"))
    try:
        sylva_compile.set_adapter(model, "two")
    except AdapterError:
        print("refused")
"""


def test_an_unpickled_model_with_another_base(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        sylva_compile.save_adapter(trained(number), tmp_path / name)
    torch.save(net(), tmp_path / "base.pt")
    torch.save(net(7).state_dict(), tmp_path / "other.pt")
    # Two processes, each of which may number the bases that it sees from the beginning.
    for phase, printed in (("first", ""), ("second", "refused\n")):
        command = [sys.executable, "-c", NEW_PROCESS, str(tmp_path), phase]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert found.stdout == printed


def test_a_head_that_the_next_adapter_lacks_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = on_top_of_a_head(tmp_path / "first")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sylva_compile"):
        sylva_compile.save_adapter(model, tmp_path / "second", modules_to_save=["4"])
        assert not caplog.text
        sylva_compile.save_adapter(model, tmp_path / "third")
    assert "2 tensors that a loaded adapter holds whole are not in this one, 4." in caplog.text


def test_loading_that_runs_out_of_memory_leaves_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sylva_compile.save_adapter(trained(), tmp_path)
    model = net()
    with monkeypatch.context() as patch:
        run_out_at(2, BlockState, "take_trained", patch)
        with pytest.raises(torch.OutOfMemoryError):
            sylva_compile.load_adapter(model, tmp_path)
    assert torch.equal(model(X), net()(X))
    sylva_compile.load_adapter(model, tmp_path)
    assert torch.equal(model(X), trained()(X))


def test_loading_in_inference_mode(tmp_path: Path) -> None:
    sylva_compile.save_adapter(trained(), tmp_path)
    model = net()
    embedded(model)
    with torch.inference_mode(), pytest.raises(EmbedError, match="inference_mode"):
        sylva_compile.load_adapter(model, tmp_path)
    sylva_compile.load_adapter(model, tmp_path)
    assert torch.equal(model(X), trained()(X))


def test_two_that_save_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"first": trained(0), "second": trained(1)}
    first_is_done, second_wrote_tensors = threading.Event(), threading.Event()
    write = adapter_format.write_file

    def in_turns(path: Path, content: bytes) -> None:
        if path.name == CONFIG_NAME and threading.current_thread().name == "second":
            second_wrote_tensors.set()
            assert first_is_done.wait(60)
        elif path.name == CONFIG_NAME:
            assert second_wrote_tensors.wait(60)
        write(path, content)

    def save(name: str) -> None:
        sylva_compile.save_adapter(models[name], tmp_path)
        if name == "first":
            first_is_done.set()

    with monkeypatch.context() as patch:
        patch.setattr(adapter_format, "write_file", in_turns)
        threads = [threading.Thread(target=save, args=(name,), name=name) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    model = net()
    sylva_compile.load_adapter(model, tmp_path)
    assert torch.equal(model(X), models["second"](X))


@pytest.mark.parametrize(
    "damage",
    [
        lambda config: config.pop("weights"),
        lambda config: config.pop("modules_to_save"),
        lambda config: config["weights"].clear(),
        lambda config: config["weights"].pop("0.weight"),
        lambda config: config["weights"].update(other=config["weights"]["0.weight"]),
        *(
            lambda config, name=name: config["weights"]["0.weight"].pop(name)
            for name in ("shape", "dtype", "block_size", "base")
        ),
        lambda config: config["weights"]["0.weight"].update(block_size=8),
        lambda config: config["modules_to_save"].update({"4.weight": "float32"}),
    ],
)
def test_a_description_that_does_not_fit_its_tensors(damage: Any, tmp_path: Path) -> None:
    sylva_compile.save_adapter(trained(), tmp_path)
    path = tmp_path / CONFIG_NAME
    config = json.loads(path.read_text())
    damage(config)
    path.write_text(json.dumps(config))
    model = net()
    with pytest.raises(AdapterError, match="damaged or no adapter"):
        sylva_compile.load_adapter(model, tmp_path)
    assert type(model[0]) is nn.Linear
    assert copy.deepcopy(model)(X).equal(net()(X))
