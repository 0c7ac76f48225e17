"""The embedded weights of the process, and everything that is installed in torch as long as there are any.

Optimizers of any kind must write the blocks that they step into the dense weights, and compiled graphs must find the
state of a tensor that they are called with. Both need process-wide state, which this module owns:

* the live states, in the order in which they were added. The order is the same on all ranks that run one program;
* a counter that grows whenever a state is added, removed, or gets other tensors;
* the look-up from a tensor to the state that it belongs to;
* the hooks before and after every optimizer's step, and those on every parameter and submodule that a module registers,
  installed with the first state and removed with the last;
* the names in `torch.compiler.config.dynamic_sources`, each withdrawn with the states that asked for it.

Copied and unpickled states are added as they are made. A state that is garbage-collected with its model leaves the
look-up at once. Hooks and names stay until the next call of `add`, `remove` or `tidy`, since Python may collect garbage
while torch iterates over the hooks.
"""

import copyreg
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sylva_compile.blocks.base_warnings import not_shareable
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import note_wrapper
from sylva_compile.blocks.partitioned import not_parallel
from sylva_compile.blocks.quantised_state import QuantisedState
from sylva_compile.blocks.shards import gather, is_sharded
from sylva_compile.embedded.wrapping import follow_wrapping
from sylva_compile.kernels.gate import is_closed

_live: "weakref.WeakKeyDictionary[BlockState, None]" = weakref.WeakKeyDictionary()
_changes = 0
_by_tensor: tuple[int, dict[int, "weakref.ref[BlockState]"]] = (-1, {})
"""The number of changes at which the look-up was made, and the state of each tensor by the tensor's `id`."""
is_traced = False
"""Whether a trace is under way, which observes the gradients of dense weights."""
_hooks: list[Any] = []
_sources: "weakref.WeakKeyDictionary[BlockState, set[str]]" = weakref.WeakKeyDictionary()
_added_sources: set[str] = set()
_COMPILERS = ("torch._", "torch.export", "torch.fx", "torch.jit")
_OPTIMIZER_FILE = sys.modules[torch.optim.Optimizer.__module__].__file__


def add(state: BlockState) -> None:
    """Follow `state` from now on; adding it twice is adding it once."""
    if state not in _live:
        _live[state] = None
        note_change()
    tidy()


def remove(state: BlockState) -> None:
    """Follow `state` no longer: its blocks are about to leave the model."""
    _live.pop(state, None)
    _sources.pop(state, None)
    note_change()
    tidy()


@contextmanager
def traced() -> Iterator[None]:
    """Let modules hand out their dense Parameters inside of the block, and gradients flow to them."""
    global is_traced
    before, is_traced = is_traced, True
    try:
        yield
    finally:
        is_traced = before


def live_states() -> list[BlockState]:
    """Return every embedded weight of the process, in the order in which they were added."""
    return list(_live)


def note_change() -> None:
    """Count a change: a state was added or removed, or has other tensors now."""
    global _changes
    _changes += 1


def changes() -> int:
    """Return the number of changes so far. While it stays, the `id` of a living tensor identifies its state."""
    return _changes


def note_tensor(tensor: Tensor, state: BlockState) -> None:
    """Let the look-up find `state` by `tensor`, which `fully_shard` has assigned; it assigns the same ones in turns."""
    if _find(tensor) is not state:
        note_change()


def state_of_weight(tensor: Tensor) -> BlockState | None:
    """Return the state whose dense weight is `tensor`, at home or gathered."""
    state = _find(tensor)
    return state if state is not None and (state.weight is tensor or state.live_weight is tensor) else None


def state_of_blocks(tensor: Tensor) -> BlockState | None:
    """Return the state whose blocks are `tensor`."""
    state = _find(tensor)
    return state if state is not None and state.blocks is tensor else None


def state_of_positions(tensor: Any) -> BlockState | None:
    """Return the state whose positions are `tensor`."""
    state = _find(tensor)
    return state if state is not None and state.layout.positions is tensor else None


def _find(tensor: Any) -> BlockState | None:
    global _by_tensor
    changes, found = _by_tensor
    if changes != _changes:
        # A new dictionary each time, with the count from before it was made: other threads may be looking up.
        changes = _changes
        found = {
            id(own): weakref.ref(state)
            for state in live_states()
            for own in (state.weight, state.live_weight, state.blocks, state.live_blocks, state.layout.positions)
        }
        _by_tensor = changes, found
    ref = found.get(id(tensor))
    return None if ref is None else ref()


def let_blocks_vary(states: Iterable[BlockState], source: str) -> bool:
    """Let Dynamo compile for any number of blocks, as long as one of `states` lives; return whether that is new.

    Dynamo takes the shape of a Parameter as fixed unless `dynamic_sources` names the Parameter.

    Args:
        states: the weights of the model that is compiled.
        source: Dynamo's name of the blocks in the frame that it compiles.
    """
    for state in states:
        _sources.setdefault(state, set()).add(source)
    listed = _listed_sources()
    if source in listed:
        return False
    _added_sources.add(source)
    _write_sources([*listed, source])
    return True


def blocks_vary(state: BlockState) -> bool:
    """Whether `let_blocks_vary` was called for `state`."""
    return state in _sources


def tidy() -> None:
    """Install in torch what the live states need, and withdraw what they do not need any more."""
    if _live and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
        _hooks.append(register_module_parameter_registration_hook(_on_parameter))
        _hooks.append(follow_wrapping(lambda ddp, model: note_wrapper(ddp, live_states())))
    while _hooks and not _live and not _in_a_step():
        _hooks.pop().remove()
    if _added_sources and (unwanted := _added_sources.difference(*_sources.values())):
        _added_sources.difference_update(unwanted)
        _write_sources([source for source in _listed_sources() if source not in unwanted])


def _in_a_step() -> bool:
    """Whether this thread is inside of an optimizer's step, where torch iterates over the hooks."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _OPTIMIZER_FILE:
        frame = frame.f_back
    return frame is not None


def _listed_sources() -> list[str]:
    return [name for name in torch.compiler.config.dynamic_sources.split(",") if name]


def _write_sources(names: list[str]) -> None:
    torch.compiler.config.dynamic_sources = ",".join(names)


def _on_parameter(module: nn.Module, name: str, parameter: Any) -> None:
    """Refuse a dense weight that moves into another module, where its blocks would never be trained.

    And refuse the DTensor that tensor parallelism registers in place of a dense weight; `fully_shard` assigns its own.
    """
    if is_sharded(parameter) and (own := module.__dict__.get("_sylva_states", {}).get(name)) is not None:
        raise not_parallel(own.name)
    state = None if parameter is None else state_of_weight(parameter)
    if state is None or any(module is owner for owner, _ in state.owners()):
        return
    # Lists of parameters compute nothing, and compilers keep the parameters of a graph in modules of their own.
    only_holds = type(module) is nn.Module or isinstance(module, GraphModule | nn.ParameterList | nn.ParameterDict)
    if not only_holds and not type(module).__module__.startswith(_COMPILERS):
        raise not_shareable(state.name, f"the {name} of a {type(module).__name__}")


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Sync every state before any optimizer's step; a few integer comparisons where nothing was edited."""
    states = live_states()
    if any(state.disabled or state.earlier_blocks is not None or not state.is_wide for state in states):
        stepped = _stepped_by(optimizer)
        for state in states:
            if id(state.blocks) in stepped:
                state.check_enabled()
                state.check_wide()
            state.check_not_earlier(stepped)
    for state in states:
        state.sync()
        if is_closed(state.layout.gate):
            # Under DistributedDataParallel its gradient is an average of zeros, with which optimizers would decay it.
            state.blocks.grad = None
        state.had_gradient = state.blocks.grad is not None


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Write the blocks that an optimizer has stepped into their dense weights."""
    # Some optimizers leave the version counters alone (`p.data.add_`, raw pointers). So blocks that had a gradient,
    # before the step or from its closure, are written in any case; blocks without one are written if they differ.
    # The project's own optimizers move the counters, and their kernel has written the dense weights already.
    writes_through = getattr(optimizer, "writes_through", False)
    stepped = _stepped_by(optimizer)
    sharded = []
    for state in live_states():
        if id(state.blocks) not in stepped:
            continue
        state.stepped_by.add(optimizer)
        if is_sharded(state.blocks):
            sharded.append(state)
        elif writes_through:
            state.sync()
        elif state.had_gradient or state.blocks.grad is not None or not state.is_synced():
            state.push()
    # Every process needs all blocks of its rows. No condition may depend on what this one knows: all take part.
    for state, values in zip(sharded, gather([state.blocks for state in sharded]), strict=True):
        state.push_values(values)


def note_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Note that `optimizer` steps blocks before it has done so: it may hold states that were loaded."""
    stepped = _stepped_by(optimizer)
    for state in live_states():
        if id(state.blocks) in stepped:
            state.stepped_by.add(optimizer)


def _stepped_by(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _restored(values: dict[str, Any], kind: type[BlockState] = BlockState) -> BlockState:
    """Make a state from the values of another one, and follow it: its blocks may be trained at once."""
    state = kind.__new__(kind)
    state.__setstate__(values)
    add(state)
    return state


def _reduced(state: BlockState) -> tuple[Any, ...]:
    return _restored, (state.__getstate__(), type(state))


# However a model is copied: some classes copy their attributes in a `__deepcopy__` of their own.
for kind in (BlockState, QuantisedState):
    copyreg.pickle(kind, _reduced)
