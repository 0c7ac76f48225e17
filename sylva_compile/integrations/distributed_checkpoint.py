"""`blocks_state`: everything that a training of blocks changes, as an object for `torch.distributed.checkpoint`.

A checkpoint that was saved on some number of processes is loaded on any other. The state dict is:

| entry       | what it holds                                                                                     |
| ----------- | ------------------------------------------------------------------------------------------------- |
| `blocks`    | the float32 values of the blocks, `[nnz, b, b]` by weight, split where `fully_shard` splits them  |
| `originals` | the values from before training where blocks are, in the weight's dtype, `[nnz, b, b]` by weight  |
| `left`      | bytes by weight: where blocks have been and are no more, with the values before training and now  |
| `others`    | parameters that are trained beside the blocks, and buffers                                        |
| `optimizer` | states in the shape of their parameter, by optimizer and parameter; see `optimizer_states`        |
| `manifest`  | bytes: where blocks are, checksums of the base, small states of optimizers, states of schedules   |

Tensors are copies on the CPU, since torch reads a checkpoint into the tensors of a state dict: a checkpoint that is of
another base, other masks or another optimizer is refused before anything has changed.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sylva_compile.adapters.other_tensors import check_shared, frozen_tensors, other_names
from sylva_compile.adapters.resuming import check_masks, check_others, trained_beside
from sylva_compile.adapters.saving import states_to_save
from sylva_compile.blocks.block_mask import SUFFIX, BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.scope import named_weights, unwrap
from sylva_compile.blocks.shards import is_sharded, put, whole
from sylva_compile.errors import AdapterError, ArgumentError
from sylva_compile.integrations.checkpoint_calls import calling, check_loading, check_saving
from sylva_compile.integrations.optimizer_states import OptimizerStates, on_cpu
from sylva_compile.integrations.saved_places import SavedPlaces, base_at_blocks, left_behind, packed, unpacked
from sylva_compile.integrations.schedule_states import load_state_beside_adapter, masks_that_move, state_beside_adapter
from sylva_compile.lost_ranks import naming_lost_ranks

_FORMAT = "sylva-checkpoint-1"
_SOURCE = "The checkpoint"


def blocks_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    schedule: Any = None,
    *,
    masks: Masks | None = None,
) -> "CheckpointedBlocks":
    """Return the blocks of `model`, and what belongs to them, as a `Stateful` of `torch.distributed.checkpoint`.

        state = {"blocks": sylva_compile.blocks_state(model, optimizer, schedule)}
        dcp.save(state, checkpoint_id="checkpoints/100")
        dcp.load(state, checkpoint_id="checkpoints/100")

    The checkpoint holds all that the training has changed, float32 blocks included, and needs no state dict of the
    model. It is loaded into a model that carries the same masks on the same base, on any number of processes, under
    DistributedDataParallel, `fully_shard` or neither, whatever it was saved under.

    Args:
        model: the embedded model, or a wrapper of it.
        optimizer: the optimizer of the blocks and of other parameters of the model; several in a list.
        schedule: a schedule of `sylva_compile.schedules`, or of learning rates; several in a list.
        masks: those of the model, where blocks move without a schedule.

    Raises:
        AdapterError: the model carries no blocks, or a base is quantised.
    """
    return CheckpointedBlocks(model, _listed(optimizer), _listed(schedule), masks)


def _check_dense(states: Mapping[str, BlockState]) -> None:
    name = next((name for name, state in states.items() if state.is_quantised), None)
    if name is not None:
        raise AdapterError(f"{name} is quantised, and blocks_state takes dense bases alone; use save_adapter.")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class CheckpointedBlocks:
    """A `torch.distributed.checkpoint.stateful.Stateful`; `blocks_state` makes it.

    Attributes:
        model: the embedded model.
        optimizers: see `blocks_state`.
        schedules: see `blocks_state`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        schedules: Sequence[Any],
        masks: Masks | None,
    ) -> None:
        """Take what `blocks_state` takes, in lists."""
        self.model, self.optimizers, self.schedules = unwrap(model), list(optimizers), list(schedules)
        self._masks = masks
        self._checksums: dict[str, tuple[Any, str]] = {}
        _check_dense(states_to_save(self.model))

    @naming_lost_ranks("the saving of a checkpoint", "start the job again from the checkpoint before")
    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that training changes. All processes call it together.

        Raises:
            AdapterError: within `load`: the checkpoint is not whole, or of another model or training.
            ArgumentError: within `async_save`: there is no process group for it; within a save: its directory holds a
                checkpoint already; or an optimizer steps other parameters than the model's.
            EmbedError: blocks and dense weights differ, a base is not known any more, or `disable_adapter` shows it.
        """
        states = states_to_save(self.model)
        if loading := calling() == "load":
            for state in states.values():
                state.check_enabled()
        else:
            check_saving()
            for state in states.values():
                state.check_enabled()
                state.sync()
                state.check_synced()
                state.check_base_known()
        optimizers, others = self._optimizers(states), self._others(states)
        found = {
            "blocks": {name: on_cpu(state.blocks) for name, state in states.items()},
            "originals": {name: base_at_blocks(state) for name, state in states.items()},
            "left": {name: b"" if loading else left_behind(state) for name, state in states.items()},
            "others": {name: on_cpu(value) for name, value in others.items()},
            "optimizer": {str(number): each.tensors() for number, each in enumerate(optimizers)},
            "manifest": b"" if loading else packed(self._manifest(states, others, optimizers)),
        }
        check_loading(self, found)
        return found

    @naming_lost_ranks("the loading of a checkpoint", "start the job again")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was made. Gradients of blocks are dropped. All processes call it together.

        Raises:
            AdapterError: it is of another base, of other masks, or of other parameters beside the blocks.
            ArgumentError: it is of another optimizer or schedule. Nothing has changed in all these cases.
            EmbedError: `disable_adapter` shows the base.
        """
        states = states_to_save(self.model)
        manifest = unpacked(state_dict.get("manifest", b""))
        if manifest.get("format") != _FORMAT:
            raise AdapterError(f"{_SOURCE} holds no blocks of this version; give one that blocks_state has saved.")
        optimizers, others = self._optimizers(states), self._others(states)
        masks = self._masks if self._masks is not None else masks_that_move(self.schedules)
        self._check(manifest, states, others, may_move=masks is not None)
        places = {}
        for name, state in states.items():
            entry = manifest["weights"][name]
            mask = BlockMask(state.mask.shape, state.mask.block_size, entry["positions"].to(torch.int64))
            places[name] = SavedPlaces(mask, state_dict["originals"][name], state_dict["left"][name])
            if places[name].base(state) != entry["base"]:
                raise AdapterError(
                    f"{_SOURCE} was trained on another base: {name} holds other values here; load that base."
                )
        tensors = [state_dict.get("optimizer", {}).get(str(number), {}) for number in range(len(optimizers))]
        for each, values, rest in zip(optimizers, tensors, manifest["optimizers"][: len(optimizers)], strict=True):
            each.check(values, rest)

        self._load_schedules(manifest["schedules"], states)
        for name, state in states.items():
            places[name].put_into(state, state_dict["blocks"][name])
        update_input_channels(state.layout for state in states.values())
        if masks is not None:
            masks.follow()
        for name, tensor in others.items():
            put(tensor, whole(state_dict["others"][name].to(tensor.device)))
        for each, values, rest in zip(optimizers, tensors, manifest["optimizers"], strict=False):
            each.load(values, rest)
            for state in states.values():
                if each.has_state(state.blocks):
                    # Moves find the optimizers that have stepped blocks.
                    state.stepped_by.add(each.optimizer)

    def _load_schedules(self, saved: Sequence[Mapping[str, Any]], states: Mapping[str, BlockState]) -> None:
        """Load the schedules, which check their settings, and drop gradients; or change nothing and raise an error."""
        before = [state_beside_adapter(schedule) for schedule in self.schedules]
        gradients = [state.blocks.grad for state in states.values()]
        try:
            for state in states.values():
                state.blocks.grad = None
            for schedule, values in zip(self.schedules, saved, strict=False):
                load_state_beside_adapter(schedule, values)
        except Exception:
            for schedule, values in zip(self.schedules, before, strict=True):
                load_state_beside_adapter(schedule, values)
            for state, gradient in zip(states.values(), gradients, strict=True):
                state.blocks.grad = gradient
            raise

    def _optimizers(self, states: Mapping[str, BlockState]) -> list[OptimizerStates]:
        names = {id(parameter): name for name, parameter in reversed(named_weights(self.model).items())}
        names |= {id(state.blocks): name + SUFFIX for name, state in states.items()}
        return [OptimizerStates(each, names) for each in self.optimizers]

    def _others(self, states: Mapping[str, BlockState]) -> dict[str, Tensor]:
        """Return what is trained beside the blocks, and buffers."""
        stepped = (
            each for optimizer in self.optimizers for group in optimizer.param_groups for each in group["params"]
        )
        return trained_beside(self.model, states, stepped)

    def _manifest(
        self, states: Mapping[str, BlockState], others: Mapping[str, Tensor], optimizers: Sequence[OptimizerStates]
    ) -> dict[str, Any]:
        names = named_weights(self.model)
        weights = {
            name: {
                "shape": list(state.mask.shape),
                "block_size": state.mask.block_size,
                "blocks": state.mask.nnz,
                "dtype": str(state.weight.dtype),
                # The base stays while its number does.
                "base": self._checksum(name, state.base_id, state.base_weight),
                "positions": state.mask.positions.to(torch.int32),
                "shared": other_names(names, name),
            }
            for name, state in states.items()
        }
        frozen = frozen_tensors(self.model, states, others)
        return {
            "format": _FORMAT,
            "weights": weights,
            "modules_to_save": {name: str(value.dtype) for name, value in others.items()},
            "frozen": {name: self._checksum_of(name, value) for name, value in frozen.items()},
            "optimizers": [each.rest() for each in optimizers],
            "schedules": [state_beside_adapter(schedule) for schedule in self.schedules],
        }

    def _checksum(self, name: str, version: Any, read: Any) -> str:
        """Return the checksum of the tensor that `read` returns, from before if its `version` is the same."""
        if name not in self._checksums or self._checksums[name][0] != version:
            self._checksums[name] = version, checksum(read())
        return self._checksums[name][1]

    def _checksum_of(self, name: str, tensor: Tensor) -> str:
        """Return the checksum of `tensor`, from before if nothing has changed it since."""
        if is_sharded(tensor):
            # Reading one is collective, and no process may leave it out by what it alone knows.
            return checksum(tensor)
        known = weakref.ref(tensor), tensor._version, tensor.dtype, tensor.data_ptr()
        return self._checksum(name, known, lambda: tensor)

    def _check(
        self,
        manifest: Mapping[str, Any],
        states: Mapping[str, BlockState],
        others: Mapping[str, Tensor],
        *,
        may_move: bool,
    ) -> None:
        """Raise an error unless the checkpoint is one of these masks, tensors, optimizers and schedules."""
        for state in states.values():
            state.check_enabled()
        positions = {f"{name}/positions": entry["positions"] for name, entry in manifest["weights"].items()}
        check_masks(manifest, positions, states, _SOURCE, may_move=may_move)
        weights = named_weights(self.model)
        for name, state in states.items():
            entry = manifest["weights"][name]
            there, here = (entry["shape"], entry["dtype"]), (list(state.mask.shape), str(state.weight.dtype))
            if there != here:
                raise AdapterError(
                    f"{_SOURCE} has {name} {there}, which is {here} here; load the base of that training."
                )
            check_shared(name, entry, weights, _SOURCE)
        check_others(manifest, self.model, states, _SOURCE)
        for name, tensor in others.items():
            if manifest["modules_to_save"].get(name) != str(tensor.dtype):
                found = manifest["modules_to_save"].get(name, "missing")
                raise AdapterError(f"{_SOURCE} has {name} in {found}, which is {tensor.dtype} here; use one dtype.")
        counts = {"optimizers": len(self.optimizers), "schedules": len(self.schedules)}
        for kind, count in counts.items():
            if count and len(manifest[kind]) != count:
                raise ArgumentError(
                    f"{_SOURCE} holds the states of {len(manifest[kind])} {kind}, and blocks_state was given {count}; "
                    "give those of that training."
                )
