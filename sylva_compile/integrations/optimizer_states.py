"""`OptimizerStates`: the states of an optimizer by the names of its parameters, for checkpoints of any number of ranks.

For `torch.distributed.checkpoint`; `whole_states` is for files that one process writes. States in the shape of their
parameter are tensors that are split as the parameter is. Everything else is small: step counts, options, the numbers of
the steps since which blocks have been where they are.

A checkpoint is read into tensors that are there already. So parameters that have no state yet have zeros in its place:
in an optimizer that has stepped nothing, and for blocks that have moved since the last step. Which states a parameter
will have is asked of the optimizer: ours has rules that name them, and a copy of any other one steps a tiny parameter.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.moving import unwrapped
from sylva_compile.blocks.shards import local, whole
from sylva_compile.errors import ArgumentError
from sylva_compile.optim.optimizer import GeneratedOptimizer

_Group = dict[str, Any]


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU; of a DTensor, each process copies what it holds."""
    value = tensor.detach()
    return value.clone() if value.device.type == "cpu" else value.cpu()


class OptimizerStates:
    """The states of one optimizer by the names of its parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        """Take an optimizer and the names of the model's parameters by their `id`.

        Raises:
            ArgumentError: the optimizer steps other parameters than the model's, or this process has a part of the
                states.
        """
        self.optimizer = unwrapped(optimizer)
        if hasattr(self.optimizer, "consolidate_state_dict"):
            raise ArgumentError(
                f"{type(self.optimizer).__name__} keeps each state on one process; use fully_shard, which splits the "
                "states as well, or leave the optimizer out and save its own state dict."
            )
        self._groups: list[_Group] = self.optimizer.param_groups
        self._named: dict[str, tuple[_Group, Tensor]] = {}
        for group in self._groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ArgumentError(
                        f"The optimizer steps a parameter of shape {tuple(parameter.shape)} that is none of this "
                        "model's; make it after fully_shard, from the parameters of the model."
                    )
                self._named[names[id(parameter)]] = group, parameter
        self._names = names
        self._tiny: dict[tuple[Any, ...], dict[str, torch.dtype]] = {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the states that have their parameter's shape, by its name; zeros where there is none yet."""
        found = {}
        for name, (group, parameter) in self._named.items():
            own = self._of(parameter)
            missing = {
                state: torch.zeros_like(parameter.detach(), dtype=dtype)
                for state, dtype in self._expected(group, parameter).items()
                if state not in own
            }
            # Sorted, since every process must have one order.
            found[name] = {state: on_cpu(value) for state, value in sorted((missing | own).items())}
        return found

    def rest(self) -> dict[str, Any]:
        """Return everything else: options of the groups, small states, and which tensors are states."""
        groups = []
        for group in self._groups:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({"options": options, "params": [self._names[id(each)] for each in group["params"]]})
        states = {}
        for name, (_, parameter) in self._named.items():
            tensors = self._of(parameter)
            small = {
                key: whole(value).cpu() if isinstance(value, Tensor) else value
                for key, value in self.optimizer.state.get(parameter, {}).items()
                if key not in tensors
            }
            states[name] = {"tensors": {key: value.dtype for key, value in tensors.items()}, "small": small}
        return {"groups": groups, "states": states}

    def check(self, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless the optimizer can go on with `tensors` and `rest`, read from a checkpoint."""
        there = [sorted(group["params"]) for group in rest["groups"]]
        here = [sorted(self._names[id(each)] for each in group["params"]) for group in self._groups]
        if there != here:
            raise ArgumentError(
                f"The checkpoint's optimizer has {len(there)} groups with {sum(map(len, there))} parameters, and this "
                f"one {len(here)} with {sum(map(len, here))}, or others; make it as it was made then."
            )
        for name, entry in rest["states"].items():
            for state, dtype in entry["tensors"].items():
                found = tensors[name].get(state)
                if found is None or found.dtype != dtype:
                    mine = "no state" if found is None else f"{found.dtype}"
                    raise ArgumentError(
                        f"The checkpoint has {state} of {name} in {dtype}, which is {mine} in this "
                        f"{type(self.optimizer).__name__}; make the optimizer as it was made then."
                    )

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Any]) -> None:
        """Go on with `tensors` and `rest`, which `check` has seen."""
        state = {}
        for name, entry in rest["states"].items():
            values = {**entry["small"], **{key: tensors[name][key] for key in entry["tensors"]}}
            if values:
                state[name] = values
        order = {id(each): number for number, each in enumerate(each for g in self._groups for each in g["params"])}
        own = {self._names[each]: number for each, number in order.items()}
        groups = []
        for group, saved in zip(self._groups, rest["groups"], strict=True):
            kept = {"param_names": group["param_names"]} if "param_names" in group else {}
            groups.append({**saved["options"], **kept, "params": [order[id(each)] for each in group["params"]]})
        by_number = {own[name]: values for name, values in state.items()}
        self.optimizer.load_state_dict({"state": by_number, "param_groups": groups})

    def has_state(self, parameter: Tensor) -> bool:
        """Whether the optimizer has a state of `parameter`."""
        return bool(self.optimizer.state.get(parameter))

    def _of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the states of `parameter` that have its shape."""
        states = self.optimizer.state.get(parameter, {})
        return {key: value for key, value in states.items() if _is_like(key, value, parameter)}

    def _expected(self, group: _Group, parameter: Tensor) -> dict[str, torch.dtype]:
        """Return the names and dtypes of the states that `parameter` will have in its shape."""
        if isinstance(self.optimizer, GeneratedOptimizer):
            dtype = self.optimizer.options.state_dtype or parameter.dtype
            return {name: dtype for _, name in self.optimizer.rule(group).states}
        key = (id(group), parameter.dim(), parameter.dtype, local(parameter).device)
        if key not in self._tiny:
            self._tiny[key] = _states_after_a_step(self.optimizer, group, parameter)
        return self._tiny[key]


def _is_like(key: str, value: Any, parameter: Tensor) -> bool:
    """Return whether the state `key` has the shape of `parameter`; the count of steps of a scalar only seems to."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"


def _states_after_a_step(optimizer: Any, group: _Group, parameter: Tensor) -> dict[str, torch.dtype]:
    """Let a copy of `optimizer` step a tiny parameter like `parameter`; return the states that have its shape."""
    shape = [size + 2 for size in range(parameter.dim())]
    tiny = torch.nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=local(parameter).device))
    tiny.grad = torch.zeros_like(tiny)
    twin = copy.copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [tiny]}]
    devices = [tiny.device] if tiny.device.type == "cuda" else []
    try:
        # An optimizer may draw random numbers, of which the training's must not depend on saves.
        with torch.random.fork_rng(devices):
            twin.step()
    except Exception:
        # An optimizer that needs more (a closure) has the states that it has, and a resumed one must have stepped.
        return {}
    return {name: value.dtype for name, value in twin.state[tiny].items() if _is_like(name, value, tiny)}
