"""`DenseView`: the tensor that reading an embedded weight returns outside of compiled code."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sylva_compile._torch import ORDINARY_RESULTS
from sylva_compile.blocks.base_warnings import not_shareable
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.partitioned import not_parallel
from sylva_compile.errors import EmbedError


class DenseView(Tensor):
    """A view of an embedded weight's dense weight.

    `weight.data = values` is how PEFT merges an adapter. On an ordinary view, the assignment would be lost with the
    view; here the values are copied into the dense weight.
    """

    __torch_function__ = ORDINARY_RESULTS
    _sylva_state: BlockState

    @staticmethod
    def of(view: Tensor, state: BlockState) -> None:
        """Turn `view` of the dense weight of `state` into a DenseView, in place."""
        view.__class__ = DenseView
        view._sylva_state = state  # type: ignore[attr-defined]

    @property
    def data(self) -> Tensor:
        """The dense weight `[m, n]`, detached. Assigned values are copied into it, and the blocks are read from them.

        Raises:
            EmbedError: the assigned values have another shape.
        """
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        state = self._sylva_state
        if values.shape != state.weight.shape:
            raise EmbedError(
                f"{state.name} carries blocks and takes data of shape {tuple(state.weight.shape)}, not "
                f"{tuple(values.shape)}; unload the adapter first."
            )
        with torch.no_grad():
            state.weight.copy_(values)
        state.sync()

    def detach(self) -> Tensor:
        """Return the dense weight `[m, n]`, detached.

        Raises:
            EmbedError: `nn.Parameter` calls it (for `weight_norm`, say), and the new Parameter would have no blocks.
        """
        if sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            raise not_shareable(self._sylva_state.name, "another Parameter")
        return super().detach()

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """The autograd node of the view.

        Raises:
            EmbedError: `nn.Module.register_parameter` reads it. A conversion (to float8, say) then moves the weight
                into another module, where the blocks would never be trained.
        """
        found, caller = _GRAD_FN.__get__(self), sys._getframe(1)
        if caller.f_code is nn.Module.register_parameter.__code__:
            # What `torch.fx` has traced without gradients only reads its parameters, in modules that only hold them.
            holds = type(module := caller.f_locals.get("self")) is nn.Module or isinstance(module, GraphModule)
            if found is not None or not holds:
                raise not_shareable(self._sylva_state.name, "a parameter of another module")
        return found

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """Whether the view is a leaf of autograd, as of any tensor.

        Raises:
            EmbedError: `distribute_tensor` reads it: tensor parallelism is about to split the weight.
        """
        if sys._getframe(1).f_code.co_name == "distribute_tensor":
            raise not_parallel(self._sylva_state.name)
        leaf: bool = _IS_LEAF.__get__(self)
        return leaf

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)


_GRAD_FN: Any = Tensor.grad_fn
"""The descriptor that reads the autograd node of any tensor."""

_IS_LEAF: Any = Tensor.is_leaf
"""The descriptor that tells whether any tensor is a leaf."""
