"""Compute the gradient of the input alone where transformers computes it together with that of stacked experts.

Before:

    %both = transformers.grouped_mm_fallback_backward(%x, %weight, %offsets, %gy)
    %gx   = getitem(%both, 0)                                    nobody reads the dense gradient of %weight any more

After:

    %turned = aten.permute(%weight, [0, 2, 1])
    %gx     = transformers.grouped_mm_fallback(%gy, %turned, %offsets)

Refuses: an operator whose gradient of the weight is still read.
"""

import operator

import torch
from torch.fx import Graph

from sylva_compile.passes.edit import call
from sylva_compile.passes.match_weight_gradient import is_grouped_backward


def keep_input_gradients(graph: Graph) -> int:
    """Rewrite a joint `graph` in place and return the number of operators rewritten."""
    rewritten = 0
    for node in list(graph.nodes):
        if not is_grouped_backward(node):
            continue
        if not all(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
            continue
        _, weight, offsets, gradient = node.args
        with graph.inserting_before(node):
            # Inductor lowers no aten.transpose: tracing has always decomposed it before.
            turned = call(graph, torch.ops.aten.permute.default, weight, [0, 2, 1])
            product = call(graph, torch.ops.transformers.grouped_mm_fallback.default, gradient, turned, offsets)
        for user in list(node.users):
            user.replace_all_uses_with(product)
            graph.erase_node(user)
        graph.erase_node(node)
        rewritten += 1
    return rewritten
