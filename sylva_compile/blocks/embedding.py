"""Trainable blocks inside frozen weights, by class-swapped modules. The rule they follow is in `sylva_compile.blocks.site`."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sylva_compile.blocks.embedded_weight import EmbeddedWeight
from sylva_compile.blocks.scope import input_axis, named_weights, owners_of, plain_name, unwrap
from sylva_compile.blocks.site import BlockState, after_step, before_step
from sylva_compile.errors import EmbedError
from sylva_compile.kernels.blocks import block_dtype
from sylva_compile.kernels.gather_blocks import gather_blocks

if TYPE_CHECKING:
    from sylva_compile.blocks.masks import BlockMask

SUFFIX = "_blocks"


class Embed(torch.autograd.Function):
    """The dense weight, as it is, whose gradient belongs to the blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        blocks: Tensor,
        positions: Tensor,
        input_channels: Tensor,
        narrow_positions: Tensor,
        block_size: int,
        axis: int,
    ) -> Tensor:
        """Return a view of `weight [m, n]`; nothing is copied or added."""
        ctx.save_for_backward(positions, input_channels, narrow_positions)
        ctx.block_size, ctx.axis = block_size, axis
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sample the dense gradient `[m, n]` at the blocks; the dense weight itself stays frozen, whatever its flag."""
        positions, input_channels, narrow_positions = ctx.saved_tensors
        blocks = gather_blocks(gradients[0], positions, input_channels, narrow_positions, ctx.block_size, ctx.axis)
        return None, blocks, None, None, None, None, None


def _weight_property(attribute: str) -> property:
    def read(self: nn.Module) -> Tensor:
        weight, blocks = self._parameters[attribute], self._parameters[attribute + SUFFIX]
        assert weight is not None and blocks is not None
        site = self.__dict__["_sylva_states"][attribute]
        eager = not torch.compiler.is_compiling()
        training = torch.is_grad_enabled() and blocks.requires_grad
        if eager:
            # Without gradients, another dense weight (torch.func.functional_call) is what it is.
            if blocks is not site.blocks or (training and weight is not site.weight):
                raise swapped(site)
            if training:
                check_reduced([site])
            site.sync()
        if not training:
            return weight
        at = site.layout
        # Uncompiled, positions are all that is read. The others may change while a step is under way, when a layer that
        # is compiled teaches them, and a checkpointed layer that runs again must find what it found before.
        tensors = (at.positions,) * 3 if eager else (at.positions, at.input_channels, at.narrow_positions)
        value: Tensor = Embed.apply(weight, blocks, *tensors, at.block_size, at.input_axis)
        if eager:
            # torch's own mark of a Parameter by another class: `model.get_parameter(name)` asks for one. It is good for
            # reading; what is to be written is the blocks, or this weight under torch.no_grad().
            value._is_param = True
            EmbeddedWeight.of(value, site)
        return value

    # Dynamo inlines this into the frames that it compiles. Called from one that it skips (`nn.Linear.forward` run by
    # itself), this must not become a graph of its own, with the dense gradient as its boundary.
    skip_code(read.__code__)
    return property(read, doc=f"The dense `{attribute}`; its gradient flows to `{attribute}{SUFFIX}`.")


skip_code(Embed.forward.__code__)
skip_code(Embed.backward.__code__)


_reduced: "weakref.WeakKeyDictionary[BlockState, weakref.ref[Any]]" = weakref.WeakKeyDictionary()
"""The DistributedDataParallel that is known to average the gradients of a site's blocks."""


def swapped(site: BlockState) -> EmbedError:
    """The error for a training pass that reads another weight or other blocks than the site's."""
    return EmbedError(
        f"{site.name} or its blocks were swapped past the module (torch.func.functional_call, `_parameters[...]`), so "
        "the gradient would be lost; assign a Parameter to the module, or unload the adapter first."
    )


def check_reduced(sites: Iterable[BlockState]) -> None:
    """Raise EmbedError in a training pass of a DistributedDataParallel that does not know the blocks of `sites`."""
    ddp: Any = DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    for site in sites:
        if (known := _reduced.get(site)) is not None and known() is ddp:
            continue
        if not any(parameter is site.blocks for parameter in ddp._module_parameters):
            raise EmbedError(
                f"{site.name} was embedded after DistributedDataParallel had wrapped the model, which would never "
                "average its gradients; call masks.embed(model) first, then wrap the model."
            )
        _reduced[site] = weakref.ref(ddp)


class _Embedded:
    """What the generated subclasses share. `nn.Module`'s own methods follow in the order of resolution."""

    _sylva_states: dict[str, BlockState]
    _sylva_base: type

    def _settle(self) -> None:
        """Let blocks and dense weights agree before somebody looks at either."""
        for site in self._sylva_states.values():
            site.sync()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        self._settle()
        for site in self._sylva_states.values():
            _check_agrees(site)
        masters = {attribute: site.blocks.detach() for attribute, site in self._sylva_states.items()}
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for attribute, site in self._sylva_states.items():
            weight, blocks = module._parameters[attribute], module._parameters[attribute + SUFFIX]
            # Onto the meta device and off it, every owner of a shared weight would get Parameters of its own.
            for owner, name in site.owners():
                owner._parameters[name], owner._parameters[name + SUFFIX] = weight, blocks
            site.moved(weight, blocks, masters[attribute])
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        site = self.__dict__.get("_sylva_states", {}).get(name)
        if site is None:
            super().__setattr__(name, value)
            return
        if value is site.weight or getattr(value, "_base", None) is site.weight:
            # Somebody ties the weight to itself, with what reading it has given them.
            return
        _check_assigned(site, value)
        old = site.weight.detach().to(dtype=value.dtype, copy=True)
        value.requires_grad_(False)
        # A shared weight has one set of blocks, so all who share it follow.
        for module, attribute in site.owners():
            module._parameters[attribute] = value
        site.weight = value
        site.replaced(old)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        module: Any = self
        for attribute, site in self._sylva_states.items():
            site.own(module, attribute)

    def __delattr__(self, name: str) -> None:
        site = self.__dict__.get("_sylva_states", {}).get(name)
        if site is not None:
            raise EmbedError(f"{site.name} carries blocks and cannot be taken away; unload the adapter first.")
        super().__delattr__(name)

    def _replicate_for_data_parallel(self) -> Any:
        raise EmbedError("Blocks do not work under DataParallel; use DistributedDataParallel, a process a device.")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for attribute in self._sylva_states:
            destination.pop(prefix + attribute + SUFFIX, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        self._settle()
        loaded = [site for attribute, site in self._sylva_states.items() if prefix + attribute in state_dict]
        before = [(site.weight, site.weight.detach().clone()) for site in loaded]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)  # type: ignore[misc]
        for attribute in self._sylva_states:
            hidden = prefix + attribute + SUFFIX
            if hidden in missing_keys:
                missing_keys.remove(hidden)
        for site, (weight, old) in zip(loaded, before, strict=True):
            # With assign=True the weight is another one by now, and __setattr__ has followed it.
            if site.weight is weight:
                site.replaced(old)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name, so a pickle names the class it was made from.
        module: Any = self
        self._settle()
        return _rebuild, (self._sylva_base, tuple(self._sylva_states)), module.__getstate__()

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        notes = (f"{attribute}: {site.mask.nnz} trainable blocks" for attribute, site in self._sylva_states.items())
        return ", ".join(filter(None, [text, *notes]))


def _check_agrees(site: BlockState) -> None:
    """Raise EmbedError where a move of both would have to choose one of them."""
    if site.weight.device.type != "meta" and not site.is_synced():
        raise EmbedError(
            f"{site.name}: blocks and dense weight differ, so something wrote past autograd (`.data`, a raw pointer); "
            "call masks.write_through() to keep the blocks, or change the weight under torch.no_grad()."
        )


def _check_assigned(site: BlockState, value: Any) -> None:
    """Raise EmbedError unless `value` can take the place of the site's dense weight."""
    found, wanted = tuple(getattr(value, "shape", ())), tuple(site.mask.shape)
    if not isinstance(value, nn.Parameter) or found != wanted:
        raise EmbedError(
            f"{site.name} carries blocks and takes a Parameter of shape {wanted} only; unload the adapter first."
        )
    if is_traceable_wrapper_subclass(value):
        raise EmbedError(
            f"{site.name} carries blocks and takes no {type(value.data).__name__} (fully_shard?); train with "
            "DistributedDataParallel, or unload the adapter first."
        )
    if value.device != site.weight.device or block_dtype(value.dtype) != site.blocks.dtype:
        raise EmbedError(
            f"{site.name} is {site.weight.dtype} on {site.weight.device} and is given {value.dtype} on {value.device}; "
            "move the model with model.to(...), or the values before they are assigned."
        )


_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def _embedded_class(base: type, attributes: tuple[str, ...]) -> type:
    key = (base, attributes)
    if key not in _classes:
        members: dict[str, Any] = {attribute: _weight_property(attribute) for attribute in attributes}
        members["__module__"], members["_sylva_base"] = __name__, base
        _classes[key] = type(f"Embedded{base.__name__}", (_Embedded, base), members)
    return _classes[key]


def _rebuild(base: type, attributes: tuple[str, ...]) -> nn.Module:
    cls: Any = _embedded_class(base, attributes)
    module: nn.Module = cls.__new__(cls)
    # The process that unpickles it (a worker of `mp.spawn`, say) may never have embedded anything itself.
    _follow_optimizers()
    return module


def sites(model: nn.Module) -> dict[str, BlockState]:
    """Every embedded weight of `model` by its full name; a shared one by the name that its mask has."""
    names: dict[BlockState, list[str]] = {}
    for prefix, module in unwrap(model).named_modules(remove_duplicate=False):
        for attribute, site in module.__dict__.get("_sylva_states", {}).items():
            names.setdefault(site, []).append(plain_name(f"{prefix}.{attribute}" if prefix else attribute))
    return {site.name if site.name in found else found[0]: site for site, found in names.items()}


def embed(model: nn.Module, masks: "Mapping[str, BlockMask]") -> None:
    """Put trainable blocks into the weights named by `masks`; freeze those weights. Nothing else of the model changes.

    A weight that several modules share is embedded in all of them, with one set of blocks. Embedding the same masks
    again does nothing.

    Raises:
        EmbedError: the model already carries other masks, or a module cannot carry blocks, or the model is wrapped
            by DistributedDataParallel already; nothing is changed then.
    """
    wrapped, model = model, unwrap(model)
    present = sites(model)
    if present:
        if {name: site.mask for name, site in present.items()} == dict(masks):
            return
        raise EmbedError(
            f"The model already carries {len(present)} embedded weights with other masks; "
            "call sylva_compile.unload_adapter(model) or merge_adapter(model) before embedding these."
        )
    if any(isinstance(module, DistributedDataParallel) for module in wrapped.modules()):
        raise EmbedError(
            "DistributedDataParallel has wrapped this model already and would never average the blocks' gradients; "
            "call masks.embed(model) first, then wrap the model."
        )
    parameters = named_weights(model)
    planned: list[tuple[BlockState, list[tuple[nn.Module, str]]]] = []
    taken: dict[int, str] = {}
    for name, mask in masks.items():
        weight = parameters[name]
        if id(weight) in taken:
            raise EmbedError(f"{name} and {taken[id(weight)]} are one shared weight; give it one mask.")
        taken[id(weight)] = name
        planned.append(_plan(model, name, weight, mask))
    installed: list[tuple[nn.Module, str]] = []
    try:
        for site, owners in planned:
            for module, attribute in owners:
                installed.append((module, attribute))
                _install(module, attribute, site)
    except Exception as error:
        for module, attribute in installed:
            _remove(module, attribute)
        for site, _ in planned:
            site.release()
        module, attribute = installed[-1]
        raise EmbedError(
            f"A {type(module).__name__} cannot carry blocks in its {attribute} ({error}); leave it out of the scope."
        ) from error
    for site, _ in planned:
        site.weight.requires_grad_(False)
        # An optimizer that still holds the weight would go on applying a gradient from before, or decay it.
        site.weight.grad = None
    _follow_optimizers()


def _plan(
    model: nn.Module, name: str, weight: nn.Parameter, mask: "BlockMask"
) -> tuple[BlockState, list[tuple[nn.Module, str]]]:
    owners = list(owners_of(model, weight))
    for module, attribute in owners:
        if hasattr(module, attribute + SUFFIX):
            raise EmbedError(f"{name}: its module has a {attribute + SUFFIX} of its own; leave it out of the scope.")
    return BlockState(name, weight, mask, input_axis(owners[0][0])), owners


def _install(module: nn.Module, attribute: str, site: BlockState) -> None:
    held = module.__dict__.get("_sylva_states", {})
    base: type = getattr(type(module), "_sylva_base", type(module))
    cls = _embedded_class(base, (*held, attribute))
    module.register_parameter(attribute + SUFFIX, site.blocks)
    module.__dict__["_sylva_states"] = {**held, attribute: site}
    module.__class__ = cls
    site.own(module, attribute)


def _remove(module: nn.Module, attribute: str) -> None:
    """Undo `_install`, or as much of it as was done."""
    held = {name: site for name, site in module.__dict__.get("_sylva_states", {}).items() if name != attribute}
    base: type = getattr(type(module), "_sylva_base", type(module))
    module._parameters.pop(attribute + SUFFIX, None)
    if type(module) is not base:
        module.__class__ = _embedded_class(base, tuple(held)) if held else base
    if held:
        module.__dict__["_sylva_states"] = held
    else:
        module.__dict__.pop("_sylva_states", None)


_hooks: list[Any] = []


def _follow_optimizers() -> None:
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(before_step))
        _hooks.append(register_optimizer_step_post_hook(after_step))


def unembed(model: nn.Module, *, restore: bool = False) -> None:
    """Take the blocks out again: ordinary classes, ordinary weights, `requires_grad` as it was.

    Args:
        model: an embedded model; one that is not embedded is left alone.
        restore: put the base weights back bit for bit; otherwise the trained values stay in the dense weights.

    Raises:
        EmbedError: a class was made from an embedded one since, or the base is not known; nothing is changed then.
    """
    model = unwrap(model)
    held = sites(model)
    for module in model.modules():
        if "_sylva_states" in module.__dict__ and _Embedded not in type(module).__bases__:
            raise EmbedError(
                f"{type(module).__name__} was made from an embedded class (a parametrization?); remove that first."
            )
    for name, site in held.items():
        site.sync()
        if restore and not site.base_known:
            raise EmbedError(
                f"{name} was changed in place since its blocks were embedded, so its base is not known; "
                "call merge_adapter(model) to keep the values, or load the base's state dict first."
            )
    for site in held.values():
        if restore:
            site.restore_base()
        site.weight.requires_grad_(site.was_trainable)
        site.release()
    for module in list(model.modules()):
        if isinstance(module, _Embedded):
            for attribute in tuple(module._sylva_states):
                _remove(module, attribute)
