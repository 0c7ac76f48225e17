"""AOTAutograd without code generation: rewrite, partition and run the joint graph as it is."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule

from sylva_compile._torch import aot_autograd, make_boxed_func, min_cut_rematerialization_partition


def compile_eagerly(
    gm: GraphModule, example_inputs: Sequence[Any], rewrite: Callable[[Graph], object]
) -> Callable[..., Any]:
    """Compile a Dynamo graph; `rewrite` edits its joint graph of forward and backward in place before it is split."""

    def partition(module: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        rewrite(module.graph)
        module.recompile()
        return min_cut_rematerialization_partition(module, joint_inputs, **kwargs)

    return aot_autograd(fw_compiler=_without_code_generation, partition_fn=partition)(gm, example_inputs)


def _without_code_generation(gm: GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    boxed: Callable[..., Any] = make_boxed_func(gm.forward)
    return boxed
