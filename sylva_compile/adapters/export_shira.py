"""`export_peft`: trained blocks as an adapter of PEFT, of its kind SHiRA (sparse high rank adapters)."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sylva_compile.adapters.on_first_rank import on_first_rank
from sylva_compile.adapters.other_tensors import replaced_tensors, tensors_of_blocks
from sylva_compile.adapters.saving import states_to_save
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.scope import unwrap
from sylva_compile.errors import AdapterError
from sylva_compile.files import replacing_files, to_json

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write what training has changed as an adapter that `peft.PeftModel.from_pretrained(base, directory)` loads.

    SHiRA adds values at single places of a weight. The file holds, for every place that was ever trained, the trained
    value minus that of the base, in float32. Adding them rounds, so logits are those of the trained model up to
    rounding. PEFT gives every weight `[out, in]` r·(out + in) places, with one r for all; the places that are left over
    hold zeros. Bfloat16 bases need `autocast_adapter_dtype=True`, PEFT's default.

    Args:
        model: an embedded model, such as one that `load_adapter` has filled. It stays as it is.
        directory: made if missing; files of an older export are replaced.

    Raises:
        AdapterError: the model carries no blocks; a weight is no nn.Linear's alone (PEFT's SHiRA knows no other
            module); so much was trained that no r fits all weights; an adapter has replaced whole modules; or the
            directory cannot be written. Nothing is written then. `merge_and_unload` makes an ordinary model in each
            case.
        EmbedError: a base is not known any more.
    """
    model = unwrap(model)
    states = states_to_save(model)
    if whole := replaced_tensors(model):
        raise AdapterError(
            f"The adapter holds {next(iter(whole))} whole, and SHiRA has single places alone; merge it instead."
        )
    taken = tensors_of_blocks(states)
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    if others:
        raise AdapterError(
            f"{len(others)} trainable parameters outside of the blocks have no place in SHiRA, {others[0]} first; "
            "freeze them if nothing has trained them, or merge instead."
        )
    names = {id(module): name for name, module in model.named_modules()}
    modules = {name: names[id(_linear_of(name, state))] for name, state in states.items()}
    changes = {name: _changes(state) for name, state in states.items()}
    r = _rank(states, changes)
    tensors: dict[str, Tensor] = {}
    for name, (places, values) in changes.items():
        left_over = r * sum(states[name].mask.shape) - len(values)
        key = f"base_model.model.{modules[name]}"
        # A place that is named twice gets the sum, so a zero may be anywhere.
        tensors[f"{key}.shira_indices"] = torch.cat([places, places.new_zeros(2, left_over)], 1)
        tensors[f"{key}.shira_weight"] = torch.cat([values, values.new_zeros(left_over)])

    def write() -> None:
        try:
            with replacing_files(Path(directory)) as beside:
                (beside / _TENSORS).write_bytes(serialize(tensors, {"format": "pt"}))
                (beside / _CONFIG).write_text(to_json(_config(model, sorted(modules.values()), r), indent=2) + "\n")
        except OSError as error:
            raise AdapterError(
                f"No adapter can be written to {directory} ({error}); give a directory of yours."
            ) from error

    on_first_rank(states.values(), write)


def _linear_of(name: str, state: BlockState) -> nn.Module:
    """Return the nn.Linear whose weight the state's is. Raises AdapterError where another module holds it."""
    owners = list(state.owners())
    module = owners[0][0]
    if len(owners) > 1:
        raise AdapterError(f"{name} is shared by {len(owners)} modules, and PEFT would change one; merge it instead.")
    if not isinstance(module, nn.Linear) or owners[0][1] != "weight":
        kind = type(module).__name__.removeprefix("Embedded")
        raise AdapterError(f"{name} belongs to a {kind}, and PEFT's SHiRA knows nn.Linear alone; merge it instead.")
    return module


def _changes(state: BlockState) -> tuple[Tensor, Tensor]:
    """Return the places that were ever trained, `int32[2, k]`, and how far values are from the base, float32 `[k]`."""
    state.check_enabled()
    state.sync()
    state.check_synced()
    state.check_base_known()
    positions, b = state.originals.places, state.mask.block_size
    now = state.values_at(positions).to("cpu", torch.float32)
    values = now - state.originals.values.to(torch.float32)
    lane = torch.arange(b, device="cpu")
    rows = (positions[0][:, None, None] * b + lane[:, None]).expand_as(values)
    cols = (positions[1][:, None, None] * b + lane).expand_as(values)
    inside = (rows < state.mask.shape[0]) & (cols < state.mask.shape[1])
    if not bool(values.isfinite().all()):
        raise AdapterError(f"{state.name} holds NaN or infinity; go back to the last good state before the export.")
    return torch.stack([rows[inside], cols[inside]]).to(torch.int32), values[inside]


def _rank(states: Mapping[str, BlockState], changes: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """Return the least r with room for all places. Raises AdapterError where a weight is too small for it."""
    r = 1
    fullest = next(iter(states))
    for name, state in states.items():
        needed = math.ceil(len(changes[name][1]) / sum(state.mask.shape))
        if needed > r:
            r, fullest = needed, name
    for name, state in states.items():
        if r * sum(state.mask.shape) > math.prod(state.mask.shape):
            raise AdapterError(
                f"{fullest} needs SHiRA's r = {r}, and {name} {state.mask.shape} has no room for it; train fewer "
                "blocks, or merge it instead."
            )
    return r


def _config(model: nn.Module, modules: list[str], r: int) -> dict[str, Any]:
    """Return the entries of PEFT's `adapter_config.json`."""
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": r,
        # Not "random": the places are in the file, and PEFT draws none.
        "mask_type": "sylva_compile",
        "target_modules": modules,
        "fan_in_fan_out": False,
    }
