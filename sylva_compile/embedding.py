"""Trainable blocks inside frozen weights: class-swapped modules, and the rule that keeps both halves one value.

The invariant: a dense weight's blocks always equal its `<name>_blocks` parameter, rounded to the weight's dtype. The
blocks are the masters: optimizers write them, and whatever changes them is followed by a write into the dense weight;
whatever changes the dense weight (a loaded state dict, an edit in place) is followed by reading the blocks again.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sylva_compile.errors import EmbeddingError
from sylva_compile.kernels.blocks import BlockWriter, block_dtype, read_blocks
from sylva_compile.kernels.gather_blocks import gather_blocks
from sylva_compile.scope import input_axis, owners_of, unwrap

if TYPE_CHECKING:
    from sylva_compile.masks import BlockMask

SUFFIX = "_blocks"


class Layout:
    """Where a weight's blocks sit, as the tensors that the compiled graph takes as inputs.

    They are inputs and not constants of the graph, so that layers of one shape can share a compiled graph without ever
    sharing a mask.
    """

    def __init__(self, mask: "BlockMask", axis: int, device: torch.device) -> None:
        """Lay out `mask` on `device`; `axis` is the weight's input axis (1 for `nn.Linear`, 0 for Conv1D)."""
        b = mask.block_size
        positions = torch.stack([mask.rows, mask.cols])
        used, renumbered = positions[axis].unique(return_inverse=True)
        lines = (used[:, None] * b + torch.arange(b)).flatten()
        narrow = positions.clone()
        narrow[axis] = renumbered
        self.block_size, self.input_axis = b, axis
        self.positions = positions.to(device)
        self.input_lines = lines[lines < mask.shape[axis]].to(device)
        self.narrow_positions = narrow.to(device)

    def to(self, device: torch.device) -> None:
        """Move every index tensor to `device`, in place."""
        self.positions = self.positions.to(device)
        self.input_lines = self.input_lines.to(device)
        self.narrow_positions = self.narrow_positions.to(device)


class Embed(torch.autograd.Function):
    """The dense weight, as it is, whose gradient belongs to the blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        blocks: Tensor,
        positions: Tensor,
        input_lines: Tensor,
        narrow_positions: Tensor,
        block_size: int,
        axis: int,
    ) -> Tensor:
        """Return a view of `weight [m, n]`; nothing is copied or added."""
        ctx.save_for_backward(positions, input_lines, narrow_positions)
        ctx.block_size, ctx.axis = block_size, axis
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Sample the dense gradient `[m, n]` at the blocks; the dense weight itself stays frozen, whatever its flag."""
        positions, input_lines, narrow_positions = ctx.saved_tensors
        blocks = gather_blocks(gradients[0], positions, input_lines, narrow_positions, ctx.block_size, ctx.axis)
        return None, blocks, None, None, None, None, None


skip_code(Embed.forward.__code__)
skip_code(Embed.backward.__code__)


class Site:
    """One embedded weight: the dense Parameter, its blocks, and what is needed to keep them equal and to undo them."""

    def __init__(self, name: str, weight: nn.Parameter, mask: "BlockMask", axis: int) -> None:
        """Read the blocks of `weight` at `mask`; nothing is changed yet."""
        self.name = name
        self.mask = mask
        self.weight = weight
        self.was_trainable = weight.requires_grad
        self.layout = Layout(mask, axis, weight.device)
        self.writer = BlockWriter(mask.shape, torch.stack([mask.rows, mask.cols]), mask.block_size).to(weight.device)
        values = read_blocks(weight.detach(), self.layout.positions, mask.block_size)
        self.base = values.to("cpu", copy=True)
        """The blocks before training, in the weight's dtype, on the host; `unload_adapter` restores them."""
        self.blocks = nn.Parameter(values.to(block_dtype(weight.dtype)).contiguous())
        self.remember()
        _sites.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled site is alive too: its blocks are followed like any other's."""
        self.__dict__.update(state)
        self.remember()
        _sites.add(self)

    def remember(self) -> None:
        """Note that weight and blocks agree now."""
        self._versions = (self.weight._version, self.blocks._version)

    def read(self) -> None:
        """Take the blocks from the dense weight. Masters that still round to the dense value keep their low bits."""
        with torch.no_grad():
            dense = read_blocks(self.weight, self.layout.positions, self.mask.block_size)
            unchanged = self.blocks.to(dense.dtype) == dense
            self.blocks.copy_(torch.where(unchanged, self.blocks, dense.to(self.blocks.dtype)))
        self.remember()

    def write(self) -> None:
        """Write the blocks, rounded, into the dense weight."""
        self.writer.write(self.weight, self.blocks)
        self.remember()

    def sync(self) -> None:
        """Repair the invariant after an edit in place that autograd's version counters have seen."""
        weight_version, blocks_version = self._versions
        if self.weight._version != weight_version:
            self.read()
        elif self.blocks._version != blocks_version:
            self.write()

    def agrees(self) -> bool:
        """Whether the dense weight's blocks equal the rounded blocks, bit for bit (waits for the device)."""
        dense = read_blocks(self.weight.detach(), self.layout.positions, self.mask.block_size)
        return bool(torch.equal(dense, self.inside(self.blocks.detach().to(dense.dtype))))

    def base_weight(self) -> Tensor:
        """A copy of the dense weight `[m, n]` with the blocks as they were before training."""
        dense = self.weight.detach().clone()
        self.writer.write(dense, self.base.to(dense.device))
        return dense

    def inside(self, blocks: Tensor) -> Tensor:
        """`blocks [nnz, b, b]` with everything that reaches over the weight's edge set to zero."""
        b, (m, n) = self.mask.block_size, self.mask.shape
        if m % b == 0 and n % b == 0:
            return blocks
        lane = torch.arange(b, device=blocks.device)
        rows, cols = self.layout.positions
        row_inside = rows[:, None] * b + lane < m
        col_inside = cols[:, None] * b + lane < n
        return torch.where(row_inside[:, :, None] & col_inside[:, None, :], blocks, 0)

    def rebind(self, weight: nn.Parameter, blocks: nn.Parameter, masters: Tensor) -> None:
        """Follow the module's tensors to another device or dtype; `masters` are the blocks before the move."""
        self.weight, self.blocks = weight, blocks
        wide = block_dtype(weight.dtype)
        if blocks.dtype != wide:
            blocks.data = masters.to(device=blocks.device, dtype=wide)
        if weight.device.type != "meta":
            self.layout.to(weight.device)
            self.writer.to(weight.device)
            self.write()


_sites: "weakref.WeakSet[Site]" = weakref.WeakSet()
_classes: dict[tuple[type, tuple[str, ...]], type] = {}


def sync_all() -> None:
    """Repair the invariant of every embedded weight in the process; a few integer comparisons when nothing changed."""
    for site in list(_sites):
        site.sync()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    sync_all()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Not every optimizer moves the version counters (`p.data.add_`, raw pointers): what it holds is written regardless.
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for site in list(_sites):
        if id(site.blocks) in stepped:
            site.write()


_hooks: list[Any] = []


def _follow_optimizers() -> None:
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def _weight_property(attribute: str) -> property:
    def read(self: nn.Module) -> Tensor:
        weight, blocks = self._parameters[attribute], self._parameters[attribute + SUFFIX]
        assert weight is not None and blocks is not None
        site = self.__dict__["_sylva_sites"][attribute]
        eager = not torch.compiler.is_compiling()
        if eager:
            site.sync()
        if not (torch.is_grad_enabled() and blocks.requires_grad):
            return weight
        at = site.layout
        tensors = (at.positions, at.input_lines, at.narrow_positions)
        value: Tensor = Embed.apply(weight, blocks, *tensors, at.block_size, at.input_axis)
        if eager:
            # torch's own mark of a Parameter by another class: `model.get_parameter(name)` asks for one.
            value._is_param = True
        return value

    # Dynamo inlines this into the frames that it compiles. Called from one that it skips (`nn.Linear.forward` run by
    # itself), this must not become a graph of its own, with the dense gradient as its boundary.
    skip_code(read.__code__)
    return property(read, doc=f"The dense `{attribute}`; its gradient flows to `{attribute}{SUFFIX}`.")


class _Embedded:
    """What the generated subclasses share. `nn.Module`'s own methods follow in the order of resolution."""

    _sylva_sites: dict[str, Site]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module: Any = self
        masters = {attribute: site.blocks.detach() for attribute, site in self._sylva_sites.items()}
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for attribute, site in self._sylva_sites.items():
            parameters = module._parameters
            site.rebind(parameters[attribute], parameters[attribute + SUFFIX], masters[attribute])
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        site = self.__dict__.get("_sylva_sites", {}).get(name)
        if site is not None and isinstance(value, nn.Parameter):
            if value.shape != site.mask.shape:
                found, wanted = tuple(value.shape), tuple(site.mask.shape)
                raise EmbeddingError(
                    f"{site.name}: shape {found} where {wanted} is embedded; unload the adapter first."
                )
            site.weight = value.requires_grad_(False)
            site.read()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for attribute in self._sylva_sites:
            destination.pop(prefix + attribute + SUFFIX, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)  # type: ignore[misc]
        for attribute, site in self._sylva_sites.items():
            hidden = prefix + attribute + SUFFIX
            if hidden in missing_keys:
                missing_keys.remove(hidden)
            if prefix + attribute in state_dict:
                site.read()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class has no importable name, so a pickle names the class it was made from.
        module: Any = self
        return _rebuild, (type(self).__bases__[1], tuple(self._sylva_sites)), module.__getstate__()

    def extra_repr(self) -> str:
        text: str = super().extra_repr()  # type: ignore[misc]
        notes = (f"{attribute}: {site.mask.nnz} trainable blocks" for attribute, site in self._sylva_sites.items())
        return ", ".join(filter(None, [text, *notes]))


def _embedded_class(base: type, attributes: tuple[str, ...]) -> type:
    key = (base, attributes)
    if key not in _classes:
        members: dict[str, Any] = {attribute: _weight_property(attribute) for attribute in attributes}
        members["__module__"] = __name__
        _classes[key] = type(f"Embedded{base.__name__}", (_Embedded, base), members)
    return _classes[key]


def _rebuild(base: type, attributes: tuple[str, ...]) -> nn.Module:
    cls: Any = _embedded_class(base, attributes)
    module: nn.Module = cls.__new__(cls)
    return module


def site_of(module: nn.Module, attribute: str) -> Site | None:
    """The embedding of `module.<attribute>`, if it has one."""
    sites: dict[str, Site] = module.__dict__.get("_sylva_sites", {})
    return sites.get(attribute)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every embedded weight of `model` by its full name."""
    found: dict[str, Site] = {}
    seen: set[int] = set()
    for prefix, module in unwrap(model).named_modules():
        for attribute, site in module.__dict__.get("_sylva_sites", {}).items():
            if id(site) not in seen:
                seen.add(id(site))
                found[f"{prefix}.{attribute}" if prefix else attribute] = site
    return found


def embed(model: nn.Module, masks: "Mapping[str, BlockMask]") -> None:
    """Put trainable blocks into the weights named by `masks`; freeze those weights. Nothing else of the model changes.

    A weight that several modules share is embedded in all of them, with one set of blocks. Embedding the same masks
    again does nothing.

    Raises:
        EmbeddingError: the model already carries other masks.
    """
    model = unwrap(model)
    present = sites(model)
    if present:
        if {name: site.mask for name, site in present.items()} == dict(masks):
            return
        raise EmbeddingError(
            f"The model already carries {len(present)} embedded weights with other masks; "
            "call sylva_compile.unload_adapter(model) or unembed(model) before embedding these."
        )
    planned = [_plan(model, name, mask) for name, mask in masks.items()]
    for site, owners in planned:
        for module, attribute in owners:
            _install(module, attribute, site)
        site.weight.requires_grad_(False)
    _follow_optimizers()


def _plan(model: nn.Module, name: str, mask: "BlockMask") -> tuple[Site, list[tuple[nn.Module, str]]]:
    weight = model.get_parameter(name)
    owners = list(owners_of(model, weight))
    axis = input_axis(owners[0][0])
    return Site(name, weight, mask, axis), owners


def _install(module: nn.Module, attribute: str, site: Site) -> None:
    held = module.__dict__.setdefault("_sylva_sites", {})
    base = type(module).__bases__[1] if held else type(module)
    held[attribute] = site
    module.register_parameter(attribute + SUFFIX, site.blocks)
    module.__class__ = _embedded_class(base, tuple(held))


def unembed(model: nn.Module, *, restore: bool = False) -> None:
    """Take the blocks out again: ordinary classes, ordinary weights, `requires_grad` as it was.

    Args:
        model: an embedded model; one that is not embedded is left alone.
        restore: put the base weights back bit for bit; otherwise the trained values stay in the dense weights.
    """
    model = unwrap(model)
    for site in sites(model).values():
        if restore:
            site.writer.write(site.weight, site.base.to(site.weight.device))
        else:
            site.sync()
        site.weight.requires_grad_(site.was_trainable)
        _sites.discard(site)
    for module in list(model.modules()):
        held = module.__dict__.get("_sylva_sites")
        if held:
            base = type(module).__bases__[1]
            for attribute in held:
                del module._parameters[attribute + SUFFIX]
            module.__class__ = base
            del module.__dict__["_sylva_sites"]


def iter_sites() -> Iterator[Site]:
    """Every embedded weight alive in the process."""
    return iter(list(_sites))
