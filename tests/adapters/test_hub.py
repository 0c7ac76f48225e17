"""Adapters on the Hub; a folder takes the Hub's place."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from tiny_models import tiny
from torch import nn

import sylva_compile
from sylva_compile.adapters.hub import model_card
from sylva_compile.errors import AdapterError


class FakeHub:
    """Repositories in a folder, with the calls of the Hub's client that we make."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits = root, 0

    def client(self, token: Any = None) -> "FakeHub":
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repo", (), {"repo_id": repo_id})

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(self, *, repo_id: str, folder_path: str, delete_patterns: str, **rest: Any) -> Any:
        self.commits += 1
        new = {path.name for path in Path(folder_path).iterdir()}
        for old in (self.root / repo_id).glob(delete_patterns):
            if old.name not in new:
                old.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return type("Commit", (), {"commit_url": f"{repo_id}/commit/{self.commits}"})

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **rest: Any) -> str:
        if not (self.root / repo_id).is_dir():
            raise RepositoryNotFoundError("404: no such repository", response=_Response())  # type: ignore[arg-type]
        assert not any("*.pt" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(self.root / repo_id)


class _Response:
    request = None
    status_code = 404

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake.client)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def trained() -> tuple[nn.Module, nn.Module]:
    model = tiny("llama").model
    base = copy.deepcopy(model)
    masks = sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.5)
    masks.embed(model)
    with torch.no_grad():
        for blocks in masks.parameters():
            blocks.add_(1.0)
    return model, base


def test_an_adapter_goes_up_and_comes_down(hub: FakeHub) -> None:
    model, base = trained()
    assert sylva_compile.push_to_hub(model, "me/tiny") == "me/tiny/commit/1"
    masks = sylva_compile.from_pretrained(base, "me/tiny")
    assert dict(masks)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    names = {path.name for path in (hub.root / "me/tiny").iterdir()}
    assert names > {"README.md", "sylva_adapter.json"} and len(names) == 3


def test_a_later_commit_replaces_the_adapter_and_leaves_the_card(hub: FakeHub) -> None:
    model, _ = trained()
    sylva_compile.push_to_hub(model, "me/tiny")
    card = hub.root / "me/tiny/README.md"
    card.write_text("mine")
    with torch.no_grad():
        for blocks in model.parameters():
            if blocks.requires_grad and blocks.dim() == 3:
                blocks.add_(1.0)
    sylva_compile.push_to_hub(model, "me/tiny")
    assert card.read_text() == "mine"
    assert len(list((hub.root / "me/tiny").glob("*.safetensors"))) == 1


def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    model, base = trained()
    sylva_compile.save_adapter(model, tmp_path / "adapter")
    sylva_compile.from_pretrained(base, tmp_path / "adapter", "first")
    assert sylva_compile.list_adapters(base) == ["first"]


def test_what_is_no_adapter(hub: FakeHub, tmp_path: Path) -> None:
    _, base = trained()
    with pytest.raises(AdapterError, match="the Hub gives none"):
        sylva_compile.from_pretrained(base, "nobody/nothing")
    with pytest.raises(AdapterError, match="There is no folder"):
        sylva_compile.from_pretrained(base, tmp_path / "missing")
    with pytest.raises(AdapterError, match="no trained blocks"):
        sylva_compile.push_to_hub(base, "me/base")
    assert not hub.root.exists()


class TestCard:
    def test_it_names_a_base_on_the_hub(self) -> None:
        model, _ = trained()
        model.config._name_or_path = "someone/base"
        card = ModelCard(model_card(model, "me/tiny"))
        assert card.data.base_model == "someone/base"
        assert card.data.library_name == "sylva-compile"
        assert 'LlamaForCausalLM.from_pretrained("someone/base", dtype="float32")' in card.text
        assert "| sparsity | 0.5 |" in card.text

    def test_it_tells_no_path(self, tmp_path: Path) -> None:
        model, _ = trained()
        model.config._name_or_path = str(tmp_path)
        assert str(tmp_path) not in model_card(model, "me/tiny")


def test_a_saved_adapter_tells_no_path(tmp_path: Path) -> None:
    model, base = trained()
    sylva_compile.save_adapter(model, tmp_path / "first")
    masks = sylva_compile.load_adapter(base, tmp_path / "first")
    assert masks.config["adapter"] == str(tmp_path / "first")
    sylva_compile.save_adapter(base, tmp_path / "second")
    assert "adapter" not in json.loads((tmp_path / "second" / "sylva_adapter.json").read_text())["masks"]
