"""Every private name that the package imports from torch, and functions for private attributes of its objects.

Import private names from here: `from sylva_compile._torch import compile_fx`. A name is looked up when it is imported,
so that a module pays for the parts of torch that it uses, and a name that a later version lacks is an error that says
what to do. `tests/test_torch.py` looks up all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from functorch.compile import make_boxed_func as make_boxed_func
    from torch import _cslt_compress as cslt_compress
    from torch import _cslt_sparse_mm as cslt_sparse_mm
    from torch._dynamo import config as dynamo_config
    from torch._dynamo import maybe_mark_dynamic as maybe_mark_dynamic
    from torch._dynamo.backends.common import aot_autograd as aot_autograd
    from torch._dynamo.convert_frame import register_bytecode_hook as register_bytecode_hook
    from torch._dynamo.eval_frame import remove_from_cache as remove_from_cache
    from torch._dynamo.eval_frame import skip_code as skip_code
    from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
    from torch._dynamo.exc import ShortenTraceback as ShortenTraceback
    from torch._functorch import config as functorch_config
    from torch._functorch._aot_autograd.descriptors import GradAOTOutput as GradAOTOutput
    from torch._functorch._aot_autograd.descriptors import PlainAOTInput as PlainAOTInput
    from torch._functorch.partitioners import (
        min_cut_rematerialization_partition as min_cut_rematerialization_partition,
    )
    from torch._guards import TracingContext as TracingContext
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options as list_mode_options
    from torch._inductor.compile_fx import compile_fx as compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as shard_shape_and_offset
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

SEEN = "2.11 and 2.13"
"""The versions of torch in which all names below were seen."""


class Private(NamedTuple):
    """A private name: where it lives, and what to do where a version of torch lacks it."""

    module: str
    name: str
    if_gone: str


_DESCRIPTORS = "torch._functorch._aot_autograd.descriptors"

PRIVATE = {
    "make_boxed_func": Private(
        "functorch.compile", "make_boxed_func", "set `_boxed_call = True` on a function of a list"
    ),
    "cslt_compress": Private("torch", "_cslt_compress", "use torch.sparse.to_sparse_semi_structured"),
    "cslt_sparse_mm": Private("torch", "_cslt_sparse_mm", "use torch.sparse.to_sparse_semi_structured"),
    "dynamo_config": Private("torch._dynamo", "config", "use torch.compiler.config for the recompilation limits"),
    "maybe_mark_dynamic": Private("torch._dynamo", "maybe_mark_dynamic", "use torch._dynamo.mark_dynamic"),
    "aot_autograd": Private(
        "torch._dynamo.backends.common", "aot_autograd", "use functorch.compile.aot_module_simplified"
    ),
    "register_bytecode_hook": Private(
        "torch._dynamo.convert_frame", "register_bytecode_hook", "collect code objects from torch._dynamo.callback"
    ),
    "remove_from_cache": Private("torch._dynamo.eval_frame", "remove_from_cache", "call torch._dynamo.reset_code"),
    "skip_code": Private("torch._dynamo.eval_frame", "skip_code", "use torch._dynamo.disable(recursive=False)"),
    "RestartAnalysis": Private("torch._dynamo.exc", "RestartAnalysis", "find how Dynamo restarts a trace now"),
    "ShortenTraceback": Private("torch._dynamo.exc", "ShortenTraceback", "find which errors Dynamo leaves unwrapped"),
    "functorch_config": Private("torch._functorch", "config", "find how AOTAutograd's cache is switched off now"),
    "GradAOTOutput": Private(_DESCRIPTORS, "GradAOTOutput", "find how outputs of a joint graph are described now"),
    "PlainAOTInput": Private(_DESCRIPTORS, "PlainAOTInput", "find how inputs of a joint graph are described now"),
    "min_cut_rematerialization_partition": Private(
        "torch._functorch.partitioners",
        "min_cut_rematerialization_partition",
        "import it from functorch.compile",
    ),
    "TracingContext": Private("torch._guards", "TracingContext", "ask torch.compiler.is_dynamo_compiling"),
    "inductor_config": Private("torch._inductor", "config", "read the options of torch.compile alone"),
    "list_mode_options": Private("torch._inductor", "list_mode_options", "use torch._inductor.list_options"),
    "compile_fx": Private("torch._inductor.compile_fx", "compile_fx", "use torch._inductor.standalone_compile"),
    "CustomGraphPass": Private(
        "torch._inductor.custom_graph_pass", "CustomGraphPass", "find which class a joint_custom_pre_pass derives from"
    ),
    "get_hash_for_files": Private(
        "torch._inductor.custom_graph_pass", "get_hash_for_files", "hash the files with hashlib"
    ),
    "FakeTensor": Private("torch._subclasses.fake_tensor", "FakeTensor", "import it from torch.fx.experimental"),
    "shard_shape_and_offset": Private(
        "torch.distributed.tensor._utils",
        "compute_local_shape_and_global_offset",
        "find how the rows of a DTensor on this process are computed now",
    ),
    "disable_current_modes": Private(
        "torch.utils._python_dispatch", "_disable_current_modes", "use torch.utils._python_dispatch.no_dispatch"
    ),
    "is_traceable_wrapper_subclass": Private(
        "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", "look for `__tensor_flatten__` on the type"
    ),
}


def __getattr__(name: str) -> Any:
    if name not in PRIVATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute, if_gone = PRIVATE[name]
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"torch {torch.__version__} has no {module}.{attribute}, which sylva_compile uses (seen in {SEEN}); "
            f"install one of these, or change sylva_compile/_torch.py: {if_gone}."
        ) from error


# The functions below read private attributes of objects. Where an attribute is gone, the function is what to change.


def is_fx_tracing() -> bool:
    """Whether `torch.fx.symbolic_trace` runs a model now; it knows the Parameters of modules and no views of them."""
    return bool(torch.fx._symbolic_trace._is_fx_tracing_flag)


def operator_of(custom_op: Any) -> Any:
    """Return the operator that a custom op is in a graph, to compare with `node.target`."""
    return custom_op._opoverload


def active_ddp() -> Any:
    """Return the DistributedDataParallel whose forward pass is running, or None."""
    return DistributedDataParallel._get_active_ddp_module()


def parameters_of_ddp(ddp: Any) -> list[nn.Parameter]:
    """Return the parameters whose gradients a DistributedDataParallel averages."""
    parameters: list[nn.Parameter] = ddp._module_parameters
    return parameters


def shard_of(tensor: Any) -> Tensor:
    """Return what this process holds of a DTensor, in the same memory, without autograd."""
    shard: Tensor = tensor._local_tensor
    return shard


def group_of_mesh(mesh: Any) -> Any:
    """Return the group of all processes of a DeviceMesh of several dimensions; the first call makes it, on all."""
    return mesh._flatten().get_group()


def reduces_gradients(module: Any) -> bool:
    """Whether a module that `fully_shard` has taken reduces gradients now; see its `set_requires_gradient_sync`."""
    return all(group.reduce_grads for group in _groups_of_fsdp(module))


def divisor_of_gradients(module: Any) -> float | None:
    """Return what a module that `fully_shard` has taken divides gradients by; see its `set_gradient_divide_factor`.

    None, unless that was called, stands for the number of processes.
    """
    set_ones = (group.gradient_divide_factor for group in _groups_of_fsdp(module))
    return next((factor for factor in set_ones if factor is not None), None)


def forget_sharded(model: nn.Module, parameters: Any) -> None:
    """Let `fully_shard`, which has taken modules of `model`, gather these parameters no more."""
    gone = {id(parameter) for parameter in parameters}
    for module in model.modules():
        for group in _groups_of_fsdp(module):
            group.fsdp_params = [each for each in group.fsdp_params if id(each.sharded_param) not in gone]


def prepare_pass(module: Any) -> None:
    """Let a module that `fully_shard` has taken do now what it would do in its first pass.

    It notes there, for good, the dtype of the parameters that require grad.
    """
    module._get_fsdp_state()._lazy_init()


def abandon_pass(module: Any) -> None:
    """Let a module that `fully_shard` has taken forget a pass that an error has ended."""
    state = module._get_fsdp_state()
    if not state._is_root:
        return
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    # torch 2.11 lacks it.
    states = state._state_ctx.all_states
    for one in states:
        one._training_state = type(one._training_state).IDLE
    for owner in {owner for one in states for owner in one._modules}:
        for group in _groups_of_fsdp(owner):
            if group._all_gather_result is not None:
                group._training_state = type(group._training_state).IDLE
                group.wait_for_unshard()
            group._post_forward_indices.clear()
            group._training_state = type(group._training_state).IDLE
    state._comm_ctx.all_gather_state = None
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _groups_of_fsdp(module: Any) -> list[Any]:
    """Return the groups of parameters that `fully_shard` gathers for `module`; none if it has not taken it."""
    if not hasattr(module, "_get_fsdp_state"):
        return []
    state = module._get_fsdp_state()
    # torch 2.11 has one group a module.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def at_end_of_backward(function: Any) -> None:
    """Call `function` at the end of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def running_backward() -> int:
    """Return a number of the backward pass that is running in this thread, another one for each; -1 outside of one."""
    number: int = torch._C._current_graph_task_id()
    return number


def compiled_call(module: nn.Module) -> Any:
    """Return what `module.compile()` has put in place of the module's call, or None."""
    return module._compiled_call_impl


def uncompiled_call(module: nn.Module) -> Any:
    """Return the call of `module` that `Module.compile` does not replace; it runs hooks and `forward`."""
    return module._call_impl


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Put `call` in place of the module's call; None: the module runs uncompiled."""
    module._compiled_call_impl = call


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of the module's own buffers that a state dict leaves out."""
    return module._non_persistent_buffers_set


def axes_marked_dynamic(tensor: Tensor) -> set[int]:
    """Return the axes of `tensor` that `maybe_mark_dynamic` has marked."""
    return getattr(tensor, "_dynamo_weak_dynamic_indices", set())


def mark_as_parameter(tensor: Tensor) -> None:
    """Let `isinstance(tensor, nn.Parameter)` be true: torch's own mark for Parameters of another class."""
    tensor._is_param = True


def set_version(tensor: Tensor, version: int) -> None:
    """Set the number by which autograd counts the writes into `tensor`, from 0 to 2**32 - 1."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


ORDINARY_RESULTS: Any = torch._C._disabled_torch_function_impl
"""As the `__torch_function__` of a subclass of Tensor: operations on it take and return ordinary tensors."""


def search_sparse_mm(compressed: Tensor, dense: Tensor) -> tuple[int, int, int]:
    """Return cuSPARSELt's fastest algorithm for `cslt_sparse_mm(compressed, dense)ᵀ`, with its split and split mode."""
    private: Any = torch._C
    algorithm, split, mode, _ = private._cusparselt.mm_search(compressed, dense, None, None, None, True)
    return algorithm, split, mode
