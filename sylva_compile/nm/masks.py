"""`NMMasks`: the N:M masks of a model's weights."""

import logging
import os
import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sylva_compile.blocks.fingerprint import is_other_base
from sylva_compile.blocks.scope import check_weight, named_weights, unwrap
from sylva_compile.embedded.bound_masks import BoundMasks
from sylva_compile.errors import EmbedError, MaskError
from sylva_compile.nm.embedding import embed, nm_modules
from sylva_compile.nm.freezing import freeze
from sylva_compile.nm.low_rank import LEFT, RIGHT
from sylva_compile.nm.mask import NMMask
from sylva_compile.nm.mask_file import read_masks, write_masks
from sylva_compile.nm.mask_summary import summary_of
from sylva_compile.nm.module import VALUES, values_of
from sylva_compile.nm.second_mask import SECOND, read_second

log = logging.getLogger(__name__)


class NMMasks(BoundMasks[NMMask]):
    """The masks of a model: a mapping from weight name to `NMMask`, usually bound to the model it was made for.

    Attributes:
        config: how the masks were made; files keep it.
        double: whether input gradients use a second mask (SLoPe's double pruning).
    """

    def __init__(
        self,
        masks: Mapping[str, NMMask],
        *,
        model: nn.Module | None = None,
        double: bool = True,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Make masks from `masks`, by weight name; `model`, which they are bound to if given, is not kept alive."""
        self.double = double
        super().__init__(masks, model, config)

    def __repr__(self) -> str:
        return f"NMMasks({len(self)} weights, {'bound' if self.model is not None else 'not bound'})"

    def bind(self, model: nn.Module) -> None:
        """Bind to `model` after checking that every masked weight is there in its shape, whole or pruned by these.

        Raises:
            MaskError: the model lacks a masked weight or has it in another shape.
            ScopeError: a weight cannot be pruned (quantised, on the meta device).
            EmbedError: the model is pruned by other masks.
        """
        model = unwrap(model)
        present = nm_modules(model)
        if present:
            self._check_same(present)
        else:
            weights = named_weights(model)
            self.check_shapes(weights)
            for name in self:
                check_weight(name, weights[name])
        self._model = weakref.ref(model)

    def _check_same(self, present: Mapping[str, Any]) -> None:
        same = present.keys() == self.keys() and all(
            present[name]._nm_layout.double == self.double and mask.same_as(present[name]._nm_layout)
            for name, mask in self.items()
        )
        if not same:
            raise EmbedError(
                f"The model already has {len(present)} weights pruned by other masks; call unprune(model) first."
            )

    def embed(self, model: nn.Module | None = None) -> nn.Module:
        """Prune the weights of `model` (the bound one if left out), and let their kept values be parameters.

        Each pruned module has a parameter `weight_values [out, in // m * n]`, float32 or wider, in place of its weight.
        Make the optimizer afterwards. Doing it twice with the same masks changes nothing.

        Returns:
            The model, changed in place.

        Raises:
            MaskError, ScopeError, EmbedError: as `bind`; or DistributedDataParallel has wrapped the model, a module
                computes otherwise than Linear and Conv1D, or the call is made under `torch.inference_mode()`. The model
                is as before then.
        """
        model = self._require_model() if model is None else model
        self.bind(model)
        if not nm_modules(model):
            self._compare_base(model)
            embed(model, self._masks, double=self.double)
        return model

    def _compare_base(self, model: nn.Module) -> None:
        """Log a warning if the weights are others than those that the masks were chosen for, and lose large values."""
        weights = named_weights(model)
        if not is_other_base(self.config, (weights[name] for name in self)):
            return
        for name, mask in self.items():
            # A pruned model that goes on has the same masks by magnitude, since all else is zero.
            if not NMMask.by_magnitude(weights[name], mask.n, mask.m, mask.input_axis).same_as(mask):
                log.warning(
                    "These masks were chosen for other weights than this model's, and would not keep their largest "
                    "values (%s first); call prune_masks again unless that is what you want.",
                    name,
                )
                return

    def modules(self) -> dict[str, Any]:
        """Return the pruned modules of the bound model by weight name; prune it if need be."""
        found = nm_modules(self.embed())
        return {name: found[name] for name in self}

    def parameters(self) -> list[nn.Parameter]:
        """Return the kept values of the bound model in the order of the masks, each with its adapter's L and Rt."""
        held = (VALUES, LEFT, RIGHT)
        modules = self.modules().values()
        return [module._parameters[name] for module in modules for name in held if name in module._parameters]

    def _pruned(self) -> dict[str, Any]:
        """Return the pruned modules by weight name, as `modules`; EmbedError if the model is not pruned (any more)."""
        if not nm_modules(self._require_model()):
            raise EmbedError("The model is not pruned: masks.embed() was not called yet, or unprune(model) was.")
        return self.modules()

    def change_masks(self) -> None:
        """Choose the second masks again from the values as they are, in place: nothing is compiled again.

        Call it after an optimizer step, not between a forward pass and its backward pass: autograd refuses that.
        `schedules.MaskChange` calls it every few steps. Without double pruning it does nothing.
        """
        for module in self._pruned().values():
            module._nm_layout.change(values_of(module))

    def freeze(self) -> None:
        """Let the bound model be for inference alone, in place, with less memory and the same output but for rounding.

        Second masks are dropped. Values and adapters are frozen and take their weights' dtype. Forward passes whose
        input requires grad raise EmbedError from then on, and so do steps of optimizers made before.
        `fold_low_rank(model)` does all this, and folds adapters.
        """
        freeze(self.embed())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what the model's own state dict lacks to resume a training exactly, by weight name.

        These are the second masks, and the values themselves where the weight's dtype rounds them.
        """
        found = {}
        for name, module in self._pruned().items():
            layout = module._nm_layout
            found[name] = {SECOND: layout.second.cpu().clone()}
            for held in (VALUES, LEFT, RIGHT):
                if held in module._parameters and module._parameters[held].dtype != layout.dtype:
                    found[name][held] = module._parameters[held].detach().cpu().clone()
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on where `state_dict` was made; load the model's own state dict before.

        States that have rows and slots in place of second masks are those of versions that kept them as numbers.

        Raises:
            MaskError: it is of other weights, or adapters are missing; nothing has changed then.
        """
        modules = self._pruned()
        if modules.keys() != state_dict.keys():
            raise MaskError("The state is of other weights than these masks; give the one that was saved with them.")
        copies: list[tuple[Tensor, Tensor]] = []
        for name, saved in state_dict.items():
            layout, parameters = modules[name]._nm_layout, modules[name]._parameters
            for key, value in read_second(saved, layout).items():
                target = layout.second if key == SECOND else parameters.get(key)
                if target is None or target.shape != value.shape:
                    raise MaskError(
                        f"{name} has no {key} of shape {tuple(value.shape)}; add its adapter before loading."
                    )
                if key != SECOND and not _rounds_to(value, target, layout.dtype):
                    raise MaskError(
                        f"{name}: the values in the state are not those of the model; load the state dict of the model "
                        "that was saved with it before."
                    )
                copies.append((target, value))
        for target, value in copies:
            target.copy_(value)

    def summary(self, tokens: int | None = None) -> str:
        """Return a table with a line for each weight, and the totals.

        Args:
            tokens: of a forward pass; with it, the table names the kernels of forward pass and input gradient for so
                many. What is not known of this machine is measured now.
        """
        model = self.model
        return summary_of(self, self.double, {} if model is None else nm_modules(model), tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as one safetensors file. Raises MaskError where that cannot be written."""
        write_masks(path, self, {"double": self.double, "config": self.config})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read masks that `save` wrote; they are not bound to a model. Raises MaskError for any other file."""
        masks, notes = read_masks(path)
        return cls(masks, double=notes["double"], config=notes["config"])


def _rounds_to(value: Tensor, held: Tensor, dtype: torch.dtype) -> bool:
    """Whether both are the same in `dtype`, in which the model's own state dict has them."""
    return torch.equal(value.to(held.device, dtype), held.to(dtype))
