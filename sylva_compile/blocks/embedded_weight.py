"""What reading an embedded weight gives in training: a view of the dense weight whose `data` can be assigned."""

from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.site import BlockState
from sylva_compile.errors import EmbedError


class EmbeddedWeight(Tensor):
    """A view of a site's dense weight.

    `weight.data = values` is how PEFT merges an adapter. Assigned to an ordinary view, it would be lost with the view.
    """

    # Operations on it take and give ordinary tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _sylva_site: BlockState

    @staticmethod
    def of(view: Tensor, site: BlockState) -> None:
        """Make `view` of the dense weight of `site` one of these, in place."""
        view.__class__ = EmbeddedWeight
        view._sylva_site = site  # type: ignore[attr-defined]

    @property
    def data(self) -> Tensor:
        """The dense weight `[m, n]`, detached. What is assigned is copied into it, and the blocks follow.

        Raises:
            EmbedError: what is assigned has another shape.
        """
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        site = self._sylva_site
        if values.shape != site.weight.shape:
            raise EmbedError(
                f"{site.name} carries blocks and takes data of shape {tuple(site.weight.shape)}, not "
                f"{tuple(values.shape)}; unload the adapter first."
            )
        with torch.no_grad():
            site.weight.copy_(values)
        site.sync()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)
