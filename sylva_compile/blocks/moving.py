"""`move`: put the blocks of a model at other places, with everything that depends on where they are."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import group_that_averages
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.embedded.wrapping import digest_of, same_on_all
from sylva_compile.errors import ArgumentError, EmbedError, MaskError

Carry = Literal["none", "intersection"]
"""Which blocks keep their optimizer states at a move: none, or those that stay where they are."""


def move(
    model: nn.Module,
    old: dict[str, BlockMask],
    new: Mapping[str, BlockMask],
    optimizer: torch.optim.Optimizer | None,
    carry: Carry,
    generator: torch.Generator | None,
) -> None:
    """Put the blocks of the weights in `new` at other places; see `Masks.move`.

    `old` are the masks of the model. They follow weight by weight: a move that runs out of memory can be done again.
    """
    if torch.is_inference_mode_enabled():
        raise EmbedError("Blocks cannot move under torch.inference_mode(), which makes tensors that nobody may change.")
    states = block_states(model)
    _check_masks(states, old, new)
    moved = {states[name]: name for name, mask in new.items() if states[name].mask != mask}
    check_same_on_all_ranks(states.values(), new)
    optimizers = _optimizers_of(moved, optimizer)
    _check_carry(set().union(*optimizers.values()), carry)
    try:
        for state, name in moved.items():
            before = state.move(new[name], generator)
            old[name] = new[name]
            for each in optimizers[state]:
                _move_states(each, state.blocks, before, carry)
    finally:
        update_input_channels(state.layout for state in states.values())


def _check_masks(states: Mapping[str, BlockState], old: Mapping[str, BlockMask], new: Mapping[str, BlockMask]) -> None:
    """Raise MaskError or EmbedError unless the blocks of every weight in `new` can move."""
    for state in states.values():
        state.check_enabled()
    for name, mask in new.items():
        if name not in old:
            raise MaskError(f"These masks have no weight {name!r}; move the blocks of weights that carry some.")
        if name not in states or states[name].mask != old[name]:
            raise EmbedError(f"{name} does not carry the blocks of these masks; move by the masks that were embedded.")
        before = old[name]
        if (mask.shape, mask.block_size, mask.nnz) != (before.shape, before.block_size, before.nnz):
            raise MaskError(
                f"{name} has {before.nnz} blocks of {before.block_size} in a weight of {before.shape} and would get "
                f"{mask.nnz} of {mask.block_size} in {mask.shape}; blocks move, and their number and size stay."
            )
        check_no_gradients(name, states[name])


def check_no_gradients(name: str, state: BlockState) -> None:
    """Raise EmbedError if the blocks of the weight `name` have gradients."""
    if state.blocks.grad is not None:
        raise EmbedError(
            f"The blocks of {name} have gradients, which belong to where they are; step the optimizer and call "
            "zero_grad(set_to_none=True) before moving them or setting another adapter."
        )


def check_same_on_all_ranks(states: Iterable[BlockState], new: Mapping[str, BlockMask]) -> None:
    """Raise EmbedError if processes whose gradients are averaged would move blocks to different places."""
    if not same_on_all(group_that_averages(states), digest_of({name: mask.positions for name, mask in new.items()})):
        raise EmbedError(
            "The processes would move blocks to different places, and their gradients would be averaged across them; "
            "choose the places with one seed, or on one process for all."
        )


def _optimizers_of(
    states: Iterable[BlockState], given: torch.optim.Optimizer | None
) -> dict[BlockState, set[torch.optim.Optimizer]]:
    """Return the optimizers of each state's blocks: those that have stepped them, and the one given."""
    known = None if given is None else {id(each) for group in given.param_groups for each in group["params"]}
    found = {}
    for state in states:
        if known is not None and id(state.blocks) not in known:
            raise ArgumentError(
                f"The optimizer does not step the blocks of {state.name}; give the one that has masks.parameters()."
            )
        found[state] = {unwrapped(each) for each in (*state.stepped_by, *([given] if given is not None else []))}
    return found


def check_optimizers(states: Iterable[BlockState], given: torch.optim.Optimizer | None, carry: Carry) -> None:
    """Raise ArgumentError where the optimizers of `states`, and the one given, cannot follow moves with `carry`."""
    _check_carry(set().union(*_optimizers_of(states, given).values()), carry)


def _check_carry(optimizers: Iterable[torch.optim.Optimizer], carry: Carry) -> None:
    """Raise ArgumentError if an optimizer cannot keep the states of blocks that stay."""
    if carry not in get_args(Carry):
        raise ArgumentError(f"carry={carry!r}; use 'none' or 'intersection'.")
    for optimizer in optimizers:
        if carry == "intersection" and not hasattr(optimizer, "move_state"):
            raise ArgumentError(
                f"{type(optimizer).__name__} counts steps for all blocks of a weight together, so new ones would take "
                "too large steps; use carry='none', or an optimizer of sylva_compile."
            )


def _move_states(optimizer: torch.optim.Optimizer, blocks: nn.Parameter, before: Tensor, carry: Carry) -> None:
    """Let the optimizer's states follow the blocks; those of any optimizer but ours start anew."""
    move_state = getattr(optimizer, "move_state", None)
    if move_state is not None:
        move_state(blocks, before, carry)
    elif blocks in optimizer.state:
        # torch's optimizers make a parameter's states, step count included, when they find none.
        del optimizer.state[blocks]


def restart_optimizers(state: BlockState) -> None:
    """Let every optimizer that has stepped the blocks of `state` start anew: other blocks have taken their place."""
    before = torch.full((state.mask.nnz,), -1, dtype=torch.int64, device="cpu")
    for optimizer in state.stepped_by:
        _move_states(unwrapped(optimizer), state.blocks, before, "none")


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside of wrappers such as accelerate's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]


def resume(model: nn.Module, old: dict[str, BlockMask], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Put blocks to where they were when a training was interrupted; `old` follows. See `Masks.resume`."""
    states = block_states(model)
    if saved.keys() != old.keys():
        strange = min(saved.keys() ^ old.keys())
        raise ArgumentError(f"{strange} is in the state or in the masks, but not in both; use the masks of the state.")
    new = {}
    for name, known in saved.items():
        found, wanted = tuple(known["blocks"].shape), (old[name].nnz, old[name].block_size, old[name].block_size)
        if found != wanted:
            raise ArgumentError(f"{name} has blocks {wanted}, and {found} in the state; use the masks of the state.")
        if (saw := tuple(known["places"].shape)) != (2, len(known["originals"])) or known["originals"].dim() != 3:
            raise ArgumentError(f"{name} has places {saw} in the state, which do not fit its originals; save it again.")
        new[name] = BlockMask(old[name].shape, old[name].block_size, known["positions"].to("cpu", torch.int64))
    _check_masks(states, old, new)
    places: dict[str, tuple[Tensor, Tensor]] = {
        name: (known["places"].to("cpu", torch.int64), known["originals"].cpu()) for name, known in saved.items()
    }
    for name, known in saved.items():
        # States of older versions do not tell.
        if "outside" in known and known["outside"] != states[name].checksum_outside(places[name][0]):
            raise ArgumentError(
                f"The state is of another base or dtype: {name} holds other values where no block has been; load the "
                "base of that training."
            )
    try:
        for name, known in saved.items():
            left = (known["left_places"], known["left"]) if "left" in known else None
            states[name].resume(new[name], known["blocks"], *places[name], left)
            old[name] = new[name]
    finally:
        update_input_channels(state.layout for state in states.values())
