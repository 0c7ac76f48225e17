"""`push_to_hub` and `from_pretrained`: adapters on the Hugging Face Hub, each with a model card."""

import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sylva_compile.adapters.format import CONFIG_NAME
from sylva_compile.adapters.loading import load_adapter
from sylva_compile.adapters.on_first_rank import on_first_rank
from sylva_compile.adapters.saving import save_adapter
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import AdapterError

_PATTERNS = [CONFIG_NAME, "sylva_adapter-*.safetensors"]
_CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    modules_to_save: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload blocks",
) -> str:
    """Upload the trained blocks of `model` as an adapter, with a model card; the repository is made if missing.

    The files are those of `save_adapter`. A card that is there already stays. An older adapter in the repository is
    replaced in one commit.

    Args:
        model: an embedded model.
        repo_id: "user/name" on the Hub.
        modules_to_save: as in `save_adapter`.
        private: whether a new repository is private; None: the account's default.
        token: of the account; None: the one of `hf auth login`.
        revision: the branch; None: the main one.
        commit_message: the commit's first line.

    Returns:
        The address of the commit.

    Raises:
        AdapterError, EmbedError: as `save_adapter`; nothing is uploaded then.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, modules_to_save=modules_to_save)

        def upload() -> str:
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo, _CARD, revision=revision):
                (Path(folder) / _CARD).write_text(model_card(model, repo), encoding="utf-8")
            # The tensors' file is named by its content, so the older one must go.
            commit: Any = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                delete_patterns="sylva_adapter-*.safetensors",
            )
            return str(commit.commit_url)

        return on_first_rank(block_states(unwrap(model)).values(), upload)


def from_pretrained(
    model: nn.Module,
    source: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Masks:
    """Put an adapter from the Hub, or from a folder, into `model`; see `load_adapter`.

    Only the adapter's JSON and safetensors files are downloaded, and neither can run code.

    Args:
        model: the base of the adapter.
        source: a folder, or "user/name" on the Hub where there is no such folder.
        adapter_name: as in `load_adapter`.
        revision: a branch, tag or commit on the Hub.
        token: of the account, for private repositories.

    Returns:
        The masks, bound to `model`.

    Raises:
        AdapterError: there is no such folder or repository, or one of the errors of `load_adapter`.
        ScopeError, EmbedError: as `load_adapter`.
    """
    if Path(source).is_dir():
        return load_adapter(model, source, adapter_name)
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise AdapterError(f"There is no folder {source}; give one written by save_adapter, or user/name of the Hub.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source, revision=revision, token=token, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"There is no folder {source}, and the Hub gives none ({reason}); check the name, token and network."
        ) from error
    return load_adapter(model, folder, adapter_name)


def model_card(model: nn.Module, repo_id: str) -> str:
    """Return the text of a model card: what was trained, with which settings, and how to load it.

    Raises:
        AdapterError: the model carries no blocks.
    """
    from huggingface_hub import ModelCardData

    model = unwrap(model)
    states = block_states(model)
    if not states:
        raise AdapterError("This model carries no trained blocks; embed masks or load an adapter first.")
    base = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    # A path of this machine is no name of a model, and tells strangers about its folders.
    known = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None
    data = ModelCardData(base_model=known, library_name="sylva-compile", tags=["sylva-compile", "block-sparse"])
    settings = next(iter(states.values())).masks_config
    shown = ("method", "score", "sparsity", "block_size", "allocation", "column_budget", "num_samples", "moves")
    trained = sum(state.mask.trainable for state in states.values())
    total = sum(math.prod(state.mask.shape) for state in states.values())
    places = sum(state.originals.count for state in states.values())
    every = sum(state.originals.most for state in states.values())
    rows = [
        ("weights with blocks", f"{len(states)}"),
        ("elements trained at a time", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        ("blocks ever trained", f"{places:,} of {every:,} ({places / every:.2%})"),
        *((name.replace("_", " "), str(settings[name])) for name in shown if settings.get(name) is not None),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    # An embedded model's own class may have been swapped for a generated one.
    named = (kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    cls = next(named, type(model)).__name__
    dtype = next(iter(states.values())).kind
    return f"""---
{data.to_yaml()}
---

# {repo_id}

Blocks of weights, trained inside {known or "a base model"} by sylva_compile. They hold
the trained values themselves, so nothing is added to the model, and its speed is that of the base.

```python
from transformers import {cls}
import sylva_compile

model = {cls}.from_pretrained("{known or "path/to/the/base"}", dtype="{dtype}")
sylva_compile.from_pretrained(model, "{repo_id}")
```

| | |
| --- | --- |
{table}
"""
