"""AOTAutograd without code generation: the joint graph is rewritten, partitioned and run as it is."""

from collections.abc import Callable, Sequence
from typing import Any

from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import Graph, GraphModule


def compile_eagerly(
    gm: GraphModule, example_inputs: Sequence[Any], rewrite: Callable[[Graph], object]
) -> Callable[..., Any]:
    """Compile a Dynamo graph whose joint graph of forward and backward passes through `rewrite`, in place."""

    def partition(module: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        rewrite(module.graph)
        module.recompile()
        return min_cut_rematerialization_partition(module, joint_inputs, **kwargs)

    return aot_autograd(fw_compiler=_as_it_is, partition_fn=partition)(gm, example_inputs)


def _as_it_is(gm: GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    boxed: Callable[..., Any] = make_boxed_func(gm.forward)
    return boxed
