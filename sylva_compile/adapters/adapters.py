"""Adapters: the trained blocks and where they sit, on disk; loading, merging and unloading them.

An adapter is a directory with `sylva_adapter.json` and the one safetensors file that it names. The JSON file is written
last and renamed into place, so that at every moment the directory holds a whole adapter, the old one or the new one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sylva_compile.blocks import embedding
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.masks import BlockMask, Masks
from sylva_compile.blocks.scope import check_weight, named_weights, plain_name, unwrap
from sylva_compile.blocks.site import BlockState
from sylva_compile.errors import AdapterError, SylvaError
from sylva_compile.files import write_file

log = logging.getLogger(__name__)

CONFIG_NAME = "sylva_adapter.json"
_FORMAT = "sylva-adapter-1"
_REPLACED = "_sylva_replaced"


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, modules_to_save: Sequence[str] = ()) -> None:
    """Write the trained blocks of `model` to `directory`.

    Args:
        model: an embedded model.
        directory: made if missing; an adapter that is there already is replaced in one step.
        modules_to_save: endings of module names whose parameters and buffers are stored whole beside the blocks, such
            as `["classifier"]` for a head that was trained densely (PEFT's word for the same).

    Raises:
        AdapterError: the model carries no blocks, values are not finite, blocks and dense weights disagree, a name in
            `modules_to_save` matches nothing, or the directory cannot be written. An older adapter stays then.
    """
    model = unwrap(model)
    sites = embedding.sites(model)
    if not sites:
        raise AdapterError("This model carries no trained blocks; call masks.embed(model) before training and saving.")
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    for name, site in sites.items():
        site.sync()
        blocks = site.inside(site.blocks.detach())
        if not bool(torch.isfinite(blocks).all()):
            raise AdapterError(f"{name}_blocks holds NaN or infinity; go back to the last good state before saving.")
        if not site.is_synced():
            raise AdapterError(
                f"{name}: blocks and dense weight differ, so something wrote past autograd (`.data`, a raw pointer); "
                "write the blocks instead, or change the weight under torch.no_grad()."
            )
        if not site.base_known:
            raise AdapterError(
                f"{name} was changed in place since its blocks were embedded, so nobody could load this adapter onto "
                "its base; load the base's state dict before training, or save the whole model."
            )
        tensors[f"{name}/blocks"] = blocks.cpu().contiguous()
        tensors[f"{name}/positions"] = torch.stack([site.mask.rows, site.mask.cols]).to(torch.int32)
        weights[name] = {
            "shape": list(site.mask.shape),
            "block_size": site.mask.block_size,
            "blocks": site.mask.nnz,
            "dtype": str(site.weight.dtype).removeprefix("torch."),
            "base": checksum(site.base_weight()),
        }
    extras = _extras(model, modules_to_save, sites)
    _warn_of_masked(sites, modules_to_save)
    for name, value in extras.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{name} holds NaN or infinity; go back to the last good state before saving.")
        tensors[f"{name}/whole"] = value.detach().to("cpu", copy=True).contiguous()
    _warn_of_loss(model, sites, extras)
    content = serialize(tensors)
    digest = hashlib.sha256(content).hexdigest()
    name_on_disk = f"sylva_adapter-{digest[:12]}.safetensors"
    config = {
        "format": _FORMAT,
        "torch": torch.__version__,
        "tensors": name_on_disk,
        "sha256": digest,
        "weights": weights,
        "modules_to_save": {name: checksum(value) for name, value in extras.items()},
        "frozen": {name: checksum(value) for name, value in _frozen(model, sites, extras).items()},
    }
    directory = Path(directory)
    try:
        write_file(directory / name_on_disk, content)
        write_file(directory / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
        for old in directory.glob("sylva_adapter-*.safetensors"):
            if old.name != name_on_disk:
                old.unlink()
    except OSError as error:
        raise AdapterError(f"No adapter can be written to {directory} ({error}); give a directory of yours.") from error


def load_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Masks:
    """Put the blocks saved in `directory` into `model`, whose base weights must be those that they were trained on.

    The dense weights equal those of the trained model bit for bit, and the blocks can be trained on. A model that
    carries the same masks already gets the values into its existing parameters. Where other frozen weights than those
    with blocks differ from those of the training, the log says so.

    Returns:
        The masks, bound to `model`.

    Raises:
        AdapterError: no adapter there, a damaged one, or one for another base; the model is as before then.
        EmbedError: the model carries other masks, or DistributedDataParallel has wrapped it already.
    """
    wrapped, model = model, unwrap(model)
    directory = Path(directory)
    config, tensors = _read(directory)
    masks = Masks(
        {
            name: BlockMask(tuple(entry["shape"]), entry["block_size"], *tensors[f"{name}/positions"].to(torch.int64))
            for name, entry in config["weights"].items()
        },
        config={"adapter": str(directory)},
    )
    parameters = named_weights(model)
    _check_base(config, parameters, embedding.sites(model), directory)
    whole = _named_tensors(model)
    extras = {name: tensors[f"{name}/whole"] for name in config["modules_to_save"]}
    _check_extras(extras, whole, {id(parameters[name]): name for name in masks}, directory)
    _check_replaced(model.__dict__.get(_REPLACED, {}), whole)
    # A tensor that has several names is kept once, under the first.
    first_names = {id(tensor): name for name, tensor in reversed(whole.items())}
    values = {first_names[id(whole[name])]: value for name, value in extras.items()}
    _compare_frozen(config.get("frozen", {}), whole, directory)
    masks.embed(wrapped)
    with torch.no_grad():
        for name, site in embedding.sites(model).items():
            site.blocks.copy_(tensors[f"{name}/blocks"])
            site.write()
        replaced = model.__dict__.setdefault(_REPLACED, {})
        for name in replaced.keys() - values.keys():
            # The adapter that was loaded before replaced this one; this adapter was trained beside the base's.
            whole[name].copy_(replaced.pop(name))
        for name, value in values.items():
            replaced.setdefault(name, whole[name].detach().to("cpu", copy=True))
            whole[name].copy_(value)
    return masks


def merge_adapter(model: nn.Module) -> None:
    """Leave an ordinary model behind: the trained values stay in the dense weights, the blocks and classes go."""
    embedding.unembed(model)
    unwrap(model).__dict__.pop(_REPLACED, None)


def unload_adapter(model: nn.Module) -> None:
    """Restore the base, bit for bit.

    Masked weights are again what they were before `embed`, and so are modules that an adapter replaced whole. Ordinary
    classes and `requires_grad` come back too. A model without blocks is left alone.

    Raises:
        AdapterError: a module that the adapter replaced was itself replaced or changed its shape since.
        EmbedError: a base is not known any more. Nothing is changed in either case.
    """
    model = unwrap(model)
    _check_replaced(model.__dict__.get(_REPLACED, {}), _named_tensors(model))
    embedding.unembed(model, restore=True)
    whole = _named_tensors(model)
    with torch.no_grad():
        for name, value in model.__dict__.pop(_REPLACED, {}).items():
            whole[name].copy_(value)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer of a state dict, by its plain name; shared ones under each of their names."""
    found: dict[str, Tensor] = dict(named_weights(model))
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def _check_extras(
    extras: Mapping[str, Tensor], whole: Mapping[str, Tensor], masked: Mapping[int, str], directory: Path
) -> None:
    for name, value in extras.items():
        found = whole.get(name)
        if found is None or (found.shape, found.dtype) != (value.shape, value.dtype):
            here = "missing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            raise AdapterError(
                f"{directory} stores {name} {tuple(value.shape)} of {value.dtype}, {here} here; "
                "build the model as in training."
            )
        if id(found) in masked:
            raise AdapterError(
                f"{directory} stores {name} whole, which is {masked[id(found)]} with its blocks here; "
                "build the model as in training, where they were two."
            )


def _check_replaced(replaced: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where what an adapter replaced cannot be put back."""
    for name, value in replaced.items():
        found = whole.get(name)
        if found is None or found.shape != value.shape:
            here = "gone" if found is None else f"{tuple(found.shape)}"
            raise AdapterError(
                f"{name} was {tuple(value.shape)} when an adapter replaced its values, and is {here} now; put the "
                "module back first, or call merge_adapter(model) to keep the values."
            )


def _carried(sites: Mapping[str, BlockState]) -> set[int]:
    """The `id` of every tensor that the blocks themselves account for."""
    return {id(tensor) for site in sites.values() for tensor in (site.weight, site.blocks)}


def _extras(model: nn.Module, endings: Sequence[str], sites: Mapping[str, BlockState]) -> dict[str, Tensor]:
    """What is stored whole, each tensor once: parameters and buffers of the named modules that carry no blocks."""
    extras: dict[str, Tensor] = {}
    whole = _named_tensors(model)
    taken = _carried(sites)
    if isinstance(endings, str):
        raise AdapterError(f"modules_to_save={endings!r} is a string; give a list of module-name endings.")
    for ending in endings:
        found = [name for name, _ in model.named_modules() if name == ending or name.endswith("." + ending)]
        if not found:
            raise AdapterError(f"modules_to_save names {ending!r}, which no module ends in; see model.named_modules().")
        for module in map(plain_name, found):
            inside = {name: tensor for name, tensor in whole.items() if not module or name.startswith(f"{module}.")}
            for name, tensor in inside.items():
                if id(tensor) not in taken:
                    taken.add(id(tensor))
                    extras[name] = tensor
    return extras


def _frozen(model: nn.Module, sites: Mapping[str, BlockState], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the blocks were trained beside, each tensor once: frozen parameters, and buffers such as running means."""
    taken = _carried(sites)
    taken |= {id(tensor) for tensor in extras.values()}
    found: dict[str, Tensor] = {}
    for name, tensor in _named_tensors(model).items():
        if not tensor.requires_grad and id(tensor) not in taken and _has_values(tensor):
            taken.add(id(tensor))
            found[name] = tensor
    return found


def _has_values(tensor: Tensor) -> bool:
    """Whether there is something to compare: offloaded weights are on the meta device."""
    return tensor.device.type != "meta" and tensor.layout == torch.strided


def _compare_frozen(frozen: Mapping[str, str], whole: Mapping[str, Tensor], directory: Path) -> None:
    others = [
        name
        for name, known in frozen.items()
        if name not in whole or not _has_values(whole[name]) or checksum(whole[name]) != known
    ]
    if others:
        log.warning(
            "%d frozen weights or buffers are not those that %s was trained beside, %s first; load the same base, or "
            "save what training changed with modules_to_save.",
            len(others),
            directory,
            others[0],
        )


def _warn_of_masked(sites: Mapping[str, BlockState], endings: Sequence[str]) -> None:
    for name in sites:
        owner = "." + name.rpartition(".")[0] + "."
        if any(f".{ending}." in owner for ending in endings):
            log.warning(
                "%s carries blocks, so that these are saved and not all of it, and the base must hold the same values; "
                "leave it out of the scope to save it whole.",
                name,
            )


def _warn_of_loss(model: nn.Module, sites: Mapping[str, BlockState], extras: Mapping[str, Tensor]) -> None:
    if not any(site.blocks.requires_grad for site in sites.values()):
        log.warning(
            "No block of this model requires grad, so nothing can train them; a model is wrapped for PEFT first, and "
            "then embedded."
        )
    kept = _carried(sites)
    kept |= {id(tensor) for tensor in extras.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        log.warning(
            "%d trainable parameters outside of the blocks are not in this adapter, %s first; freeze them, or name "
            "their modules in modules_to_save.",
            len(lost),
            lost[0],
        )


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
        if config["format"] != _FORMAT:
            raise AdapterError(
                f"{path} has format {config['format']!r}, not {_FORMAT!r}; use the version that wrote it."
            )
        content = (directory / config["tensors"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise AdapterError(
                f"{directory / config['tensors']} is damaged (its checksum differs); save or copy it again."
            )
        return config, deserialize(content)
    except FileNotFoundError as error:
        raise AdapterError(f"{error.filename} does not exist; give a directory written by save_adapter.") from None
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        if isinstance(error, SylvaError):
            raise
        raise AdapterError(f"{path} is damaged or no adapter ({error!r}); save or copy it again.") from error


def _check_base(
    config: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    sites: Mapping[str, BlockState],
    directory: Path,
) -> None:
    for name, entry in config["weights"].items():
        weight = parameters.get(name)
        if weight is None:
            raise AdapterError(
                f"{directory} trains {name}, which this model lacks; load it onto the base it was made for."
            )
        found = (list(weight.shape), str(weight.dtype).removeprefix("torch."))
        wanted = (entry["shape"], entry["dtype"])
        if found != wanted:
            raise AdapterError(
                f"{directory} was made for {name} {wanted[0]} {wanted[1]}, which is {found[0]} {found[1]} here; "
                "load the base in that shape and dtype."
            )
        check_weight(name, weight)
        base = sites[name].base_weight() if name in sites else weight
        if checksum(base) != entry["base"]:
            raise AdapterError(
                f"{directory} was trained on another base: {name} holds other values here; load that base."
            )
