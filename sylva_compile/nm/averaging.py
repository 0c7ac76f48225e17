"""The parameters of pruned weights, known by name, and the checks that their gradients are averaged and stepped.

Process-wide state: the names of living parameters, the weights that pruning has replaced as long as somebody holds
them, a hook before every optimizer's step, and one that follows the making of a DistributedDataParallel.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from sylva_compile._torch import active_ddp, at_end_of_backward, parameters_of_ddp, running_backward
from sylva_compile.embedded.wrapping import follow_wrapping, not_averaged
from sylva_compile.errors import EmbedError
from sylva_compile.nm.ranks import same_places_when_wrapped

_names: Any = WeakIdKeyDictionary()
_averaged_here: Any = WeakIdKeyDictionary()
_replaced: Any = WeakIdKeyDictionary()
_frozen_when_wrapped: Any = WeakIdKeyDictionary()
_hooks: list[Any] = []
_wrapping_hooks: list[Any] = []


def note_carried(parameter: nn.Parameter, name: str) -> None:
    """Know `parameter` as one of the pruned weight `name` from now on."""
    _names[parameter] = name
    if not _wrapping_hooks:
        _wrapping_hooks.append(follow_wrapping(_on_wrapping))


def _on_wrapping(ddp: Any, model: nn.Module) -> None:
    same_places_when_wrapped(ddp, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # It averages them from now on. Both at once would write into one bucket under `gradient_as_bucket_view`.
            _averaged_here.pop(parameter, None)
        if parameter in _names:
            _frozen_when_wrapped.pop(parameter, None)
            if not parameter.requires_grad:
                _frozen_when_wrapped[parameter] = weakref.ref(ddp)


def is_carried(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter of a pruned weight."""
    return tensor in _names


def note_replaced(parameter: nn.Parameter, name: str) -> None:
    """Refuse steps of optimizers that still hold `parameter`, which another one of the weight `name` has replaced."""
    _replaced[parameter] = name
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _replaced:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (name := _replaced.get(parameter)) is not None:
                raise EmbedError(
                    f"The optimizer holds {name} from before it was pruned, folded or made dense again, and would "
                    "train nothing; make it afterwards, from model.parameters()."
                )


def check_averaged(arguments: Iterable[Any]) -> None:
    """Check, in a training pass, that the running DistributedDataParallel knows the parameters of pruned weights.

    Args:
        arguments: any values; parameters of pruned weights are looked for among them.

    Raises:
        EmbedError: it was made before the weights were pruned, or while they did not require grad. Outside of
            such a pass nothing is checked.
    """
    ddp = active_ddp()
    if ddp is None or not torch.is_grad_enabled():
        return
    known: set[int] | None = None
    for value in arguments:
        if not isinstance(value, nn.Parameter) or not value.requires_grad or value in _averaged_here:
            continue
        name = _names.get(value)
        if name is None:
            continue
        known = {id(parameter) for parameter in parameters_of_ddp(ddp)} if known is None else known
        if id(value) not in known:
            raise not_averaged(name)
        if (wrapper := _frozen_when_wrapped.get(value)) is not None and wrapper() is ddp:
            raise EmbedError(
                f"{name}: its values did not require grad when DistributedDataParallel wrapped the model, which would "
                "never average their gradients; call requires_grad_() first, then wrap the model."
            )


def average_here(parameters: list[nn.Parameter], group: Any) -> None:
    """Average the gradients of `parameters` over `group` at the end of each backward pass, from now on.

    For parameters that were made after DistributedDataParallel has wrapped the model; one that wraps it later takes
    over. Every rank calls it with the same parameters, whose values are those of the first rank afterwards. Passes
    under `no_sync` are averaged as well, which changes nothing but the number of messages.
    """
    for parameter in parameters:
        dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
        _averaged_here[parameter] = True
    averager = _Averager(parameters, group)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(averager.note)


class _Averager:
    """Averages gradients in the order of their parameters, which is the same on every rank."""

    def __init__(self, parameters: list[nn.Parameter], group: Any) -> None:
        self._parameters, self._group, self._backward = parameters, group, -1

    def note(self, parameter: Tensor) -> None:
        """Have the end of the running backward pass average all gradients."""
        # A pass that raises never ends, so it is not enough to note that one is waited for.
        if parameter in _averaged_here and self._backward != running_backward():
            self._backward = running_backward()
            at_end_of_backward(self._finish)

    def _finish(self) -> None:
        self._backward = -1
        size = dist.get_world_size(self._group)
        parameters = [parameter for parameter in self._parameters if parameter in _averaged_here]
        # A parameter that one rank alone has used is averaged on all, and one that none has used keeps no gradient.
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        used = used.to(parameters[0].device)
        dist.all_reduce(used, group=self._group)
        for parameter, ranks in zip(parameters, used.tolist(), strict=True):
            if ranks:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._group)
                parameter.grad.div_(size)
