"""`GeneratedOptimizer`: a `torch.optim.Optimizer` whose step is one generated kernel, write-through included."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from torch.optim.optimizer import ParamsT

from sylva_compile.blocks import registry
from sylva_compile.blocks.block_mask import SUFFIX
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.moving import Carry
from sylva_compile.blocks.places import zero_outside
from sylva_compile.blocks.shards import group_of, is_sharded, local, rows_of
from sylva_compile.errors import ArgumentError, GradientError
from sylva_compile.kernels.step.codegen import cpp_source, triton_source
from sylva_compile.kernels.step.lowering import Rule
from sylva_compile.kernels.step.table import Launch, Slot
from sylva_compile.optim.launches import Launches, lowered
from sylva_compile.optim.options import StepOptions
from sylva_compile.optim.state import check_parameter, laid_out_as, lies_dense, move_blocks, settle_state


class _Member(NamedTuple):
    """A parameter in a step, what the kernel needs of it, and the block state whose dense weight the step writes."""

    parameter: nn.Parameter
    slot: Slot
    gradient: Tensor | None
    block_state: BlockState | None


_Work = dict[Launch, tuple[Rule, list[_Member]]]
"""The parameters of a step by the launch that steps them, with the launch's rule."""


class GeneratedOptimizer(torch.optim.Optimizer):
    """An optimizer made from `rule(group)`; how to write one is in `sylva_compile.optim.rules`.

    One kernel steps all parameters of a device, blocks and any others, whatever their shapes and dtypes (param groups
    whose options make another rule, such as amsgrad, get a kernel each), and writes blocks, rounded, into their dense
    weights. Arithmetic is in float32, or float64 for float64 parameters.
    """

    # GradScaler then sets `grad_scale` and `found_inf` and leaves unscaling and skipping to the step.
    _step_supports_amp_scaling = True

    writes_through = True
    """Tells the post-step hook of `blocks.registry` that the step has written the dense weights already."""

    counts_steps = False
    """Whether the state holds a count of steps even if no equation uses it."""

    grad_norm: Tensor | None = None
    """With `max_grad_norm`: the norm of all gradients in the last step, before clipping."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Any) -> None:
        """Take the arguments of `torch.optim.Optimizer`, and the fields of `StepOptions` as `options`."""
        rest = self._take_options(options)
        if rest:
            raise ArgumentError(f"{type(self).__name__} has no option {next(iter(rest))!r}; see its documentation.")
        super().__init__(params, defaults)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of `group`."""
        raise NotImplementedError

    def _take_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the `StepOptions` among `options` and return the others."""
        own = {field.name for field in fields(StepOptions)}
        for name in ("foreach", "fused", "differentiable"):
            if options.get(name):
                raise ArgumentError(
                    f"{name}={options[name]} asks for another implementation; there is one: leave it out."
                )
        self.options = StepOptions(**{name: value for name, value in options.items() if name in own})
        self._reset()
        return {name: value for name, value in options.items() if name not in own}

    def _reset(self) -> None:
        stochastic = self.options.state_dtype == torch.bfloat16
        self._launches = Launches(stochastic=stochastic, products=self.options.products)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ArgumentError: a parameter is not float32, bfloat16, float16 or float64, or it is a tensor subclass that
                wraps others (`fully_shard` makes such); or the group's rule is over blocks, and it is not `[n, b, b]`.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            over_blocks = self.rule(group).is_over_blocks
            for parameter in group["params"]:
                check_parameter(parameter, over_blocks)
        except ArgumentError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the precision of `state_dtype`, and step counts of blocks keep float32."""
        super().load_state_dict(state_dict)
        # torch has rounded all of them to the parameters' dtype, which may be narrower.
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = torch.float32 if name == "born" else self.options.state_dtype
                if name != "step" and dtype is not None and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)
        registry.note_optimizer(self)  # blocks may move, or become another adapter's, before the next step

    def move_state(self, parameter: Tensor, order: Tensor, carry: Carry) -> None:
        """Let the states of `parameter` follow its blocks, which have moved. Nothing happens if it has no state.

        States of a block that has arrived start from zero, and so does its number of the step in the rule.

        Args:
            parameter: blocks `[nnz, b, b]`.
            order: `int64[nnz]` on the CPU: the index that each block had before, or -1 for a block that has arrived.
            carry: "intersection" keeps the states of blocks that stay; "none" starts all states anew.

        Raises:
            ArgumentError: `parameter` holds no blocks, `order` does not fit it, or `carry` is unknown; nothing is
                changed then.
        """
        move_blocks(self.state.get(parameter, {}), parameter, order, carry)

    def kernel_source(self) -> str:
        """Return the source of every kernel that steps these parameters: C++ for the CPU, Triton for a GPU."""
        sources = {
            (triton_source if parameter.device.type == "cuda" else cpp_source)(lowered(self.rule(group))): None
            for group in self.param_groups
            for parameter in group["params"]
        }
        return "\n".join(sources)

    # A step is one kernel already, and Dynamo cannot trace addresses.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Raises:
            ArgumentError: a gradient is sparse; nothing is changed then.
            GradientError: a gradient is not finite and `nonfinite="raise"`; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            for block_state in registry.live_states():
                # The hook before the step did this, but the closure may have edited blocks or dense weights by hand.
                block_state.sync()
        before = set(self.state)
        work = self._gather()
        for launch, (_, members) in work.items():
            launch.describe([member.slot for member in members], [member.gradient for member in members])
        stepped = False
        try:
            stepped = not work or self._launch(work)
        finally:
            if not stepped:
                for parameter in self.state.keys() - before:
                    del self.state[parameter]
        return loss

    def _gather(self) -> _Work:
        """Return every parameter that has a gradient or a state, by the launch that steps it.

        Raises:
            ArgumentError: a parameter has a sparse gradient, or its rule cannot step it; nothing is changed then.
        """
        rules = [self.rule(group) for group in self.param_groups]
        for group, rule in zip(self.param_groups, rules, strict=True):
            for parameter in group["params"]:
                if rule.is_over_blocks:
                    # Whoever changed an option of the group since it was added may have changed the rule.
                    check_parameter(parameter, over_blocks=True)
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise ArgumentError(
                        f"{type(self).__name__} does not step sparse gradients; use torch.optim.SparseAdam for that "
                        "parameter, or sparse=False in its nn.Embedding."
                    )
        work: _Work = {}
        index = 0
        for number, (group, rule) in enumerate(zip(self.param_groups, rules, strict=True)):
            launch_of = self._launches.by(rule)
            counted = rule.counts_steps or self.counts_steps or self.options.state_dtype is not None
            keeps_nothing = not counted and not rule.states
            for parameter in group["params"]:
                index += 1
                # A parameter without a gradient keeps its row in the table, so that rows do not move from step to step.
                if parameter.grad is None and parameter not in self.state and not keeps_nothing:
                    continue
                state = {} if keeps_nothing else self.state[parameter]
                states, count, born = settle_state(state, parameter, rule, self.options.state_dtype, counted=counted)
                block_state = registry.state_of_blocks(parameter)
                target = None if block_state is None else block_state.step_target()
                gradient, sharded, held = parameter.grad, is_sharded(parameter), local(parameter)
                if sharded:
                    gradient, states = None if gradient is None else local(gradient), tuple(map(local, states))
                    born = None if born is None else born[slice(*rows_of(parameter))]
                slot = Slot(held, states, count, number, index - 1, target, born)
                if gradient is not None and lies_dense(held):
                    gradient = laid_out_as(gradient, held, gradient.dtype)
                launch = launch_of(slot, gradient, sharded)
                if gradient is not None and target is not None and not launch.writes_by_address:
                    # The kernels never touch elements beyond the edge of a dense weight.
                    gradient = zero_outside(gradient, target.positions, target.matrix.shape)
                member = _Member(parameter, slot, gradient, block_state)
                work.setdefault(launch, (rule, []))[1].append(member)
        return work

    def _launch(self, work: _Work) -> bool:
        """Launch the kernels; return False if the step is known to be skipped."""
        scale, skip = self._scale_and_skip(work)
        if skip.device.type == "cpu" and skip.item():
            return False
        for launch, (rule, members) in work.items():
            device = launch.device
            groups = [group if self.rule(group) == rule else None for group in self.param_groups]
            hyper = self._launches.hyperparameters(rule, groups, device)
            launch.step(hyper, scale.to(device), skip.to(device), self.options.seed)
            _mark_written(launch, [member for member in members if member.gradient is not None])
        return True

    def _scale_and_skip(self, work: _Work) -> tuple[Tensor, Tensor]:
        """Return the factor of all gradients, and a value that is 0 unless the step is skipped; float64 `[]`.

        They are the same on all processes that hold parts of a parameter.
        """
        home, limit = next(iter(work)).device, self.options.max_grad_norm
        found = {launch: group_of(members[0].parameter) for launch, (_, members) in work.items()}
        groups = {launch: group for launch, group in found.items() if group is not None}
        scale = torch.ones((), dtype=torch.float64, device=home)
        skip = torch.zeros((), dtype=torch.float64, device=home)
        # GradScaler sets these two for the time of a step.
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            scale = scale / grad_scale.to(home).reshape(())
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            skip = skip + found_inf.to(home).reshape(())
            for group in groups.values():
                all_reduce(skip, op=ReduceOp.MAX, group=group)
        if limit is None and self.options.nonfinite == "ignore":
            return scale, skip
        sums = {launch: launch.squares().sum() for launch in work}
        for launch, group in groups.items():
            all_reduce(sums[launch], group=group)
        total = torch.stack([each.to(home) for each in sums.values()]).sum()
        if self.options.nonfinite == "raise" and not bool(skip) and not bool(torch.isfinite(total)):
            raise GradientError(f"The gradient of {self._culprit()} holds NaN or infinity; nothing was stepped.")
        if self.options.nonfinite == "skip":
            skip = skip + ~torch.isfinite(total)
        if limit is not None:
            self.grad_norm = total.sqrt() * scale
            scale = scale * (limit / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return scale, skip

    def _culprit(self) -> str:
        """Return the name of the first parameter whose gradient is not finite, or its place."""
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None or bool(torch.isfinite(local(parameter.grad)).all()):
                    continue
                if "param_names" in group:
                    return str(group["param_names"][place])
                state = registry.state_of_blocks(parameter)
                return f"parameter {place} of group {number}" if state is None else state.name + SUFFIX
        return "some parameter"


def _mark_written(launch: Launch, members: list[_Member]) -> None:
    """Tell autograd and the block states which tensors the launch has written."""
    if launch.writes_by_address:
        written = [tensor for each in members for tensor in (each.slot.param, *each.slot.states)]
        # Autograd counts the writes into a DTensor apart from those into its memory.
        written += [each.parameter for each in members if each.parameter is not each.slot.param]
        written += [each.slot.target.matrix for each in members if each.slot.target is not None]
        torch.autograd.graph.increment_version(written)
    for member in members:
        state, target = member.block_state, member.slot.target
        if state is None or is_sharded(state.blocks):
            # Blocks of which this process holds a part are written after the step, by one message for all.
            continue
        if launch.writes_by_address and target is not None and target.by_address:
            state.mark_synced()
        else:
            state.push()
