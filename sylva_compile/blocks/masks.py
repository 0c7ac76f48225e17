"""`Masks`: the chosen blocks of a model's weights."""

import copy
import logging
import os
import weakref
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_mask import BlockMask, check_block_fits
from sylva_compile.blocks.embed import block_states, embed
from sylva_compile.blocks.fingerprint import is_other_base
from sylva_compile.blocks.mask_summary import summary_of
from sylva_compile.blocks.moving import Carry, move, resume
from sylva_compile.blocks.quantised_base import check_blocks_divide, tensors_of_bases
from sylva_compile.blocks.scope import check_owners, check_weight, named_weights, unwrap
from sylva_compile.config import check_block_size
from sylva_compile.embedded.bound_masks import BoundMasks
from sylva_compile.embedded.mask_file import MaskFile
from sylva_compile.errors import MaskError
from sylva_compile.kernels.blocks import matrix_shape
from sylva_compile.quantised.registry import shape_of

log = logging.getLogger(__name__)

_FILE = MaskFile("sylva-masks-1", "masks", "Masks.save")


class Masks(BoundMasks[BlockMask]):
    """The masks of a model: a mapping from weight name to `BlockMask`, usually bound to the model it was made for.

    Attributes:
        config: how the masks were made: the fields of SylvaConfig that choose blocks, versions, and the base's
            fingerprint. Files and adapters keep it.
    """

    def __init__(
        self,
        blocks: Mapping[str, BlockMask],
        *,
        model: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Make masks from `blocks`, by weight name.

        Args:
            blocks: weight name to its mask.
            model: the model to bind to, if any; it is not kept alive.
            config: how the masks were made; files and adapters keep it.
        """
        super().__init__(blocks, model, config)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Masks":
        """Copy; bound to the copy of the model where the model was copied before in the same call."""
        twin = Masks(copy.deepcopy(self._masks, memo), config=copy.deepcopy(self.config, memo))
        model = None if self.model is None else memo.get(id(self.model))
        if model is not None:
            twin._model = weakref.ref(model)
        return twin

    def __repr__(self) -> str:
        nnz = sum(mask.nnz for mask in self.values())
        return f"Masks({len(self)} weights, {nnz} blocks, {'bound' if self.model is not None else 'not bound'})"

    @classmethod
    def from_block_maps(cls, model: nn.Module, block_maps: Mapping[str, Tensor], block_size: int) -> "Masks":
        """Make masks by hand, bound to `model`.

        Args:
            model: the model whose weights are named.
            block_maps: weight name to `bool[ceil(m/b), ceil(n/b)]`.
            block_size: b, 8 or more.

        Raises:
            ArgumentError: the block size is below 8, or larger than every dimension of every weight named.
            MaskError: the model lacks a name, or a map has another shape.
            ScopeError: a weight cannot carry blocks.
        """
        check_block_size(block_size)
        parameters = named_weights(model)
        missing = [name for name in block_maps if name not in parameters]
        if missing:
            raise MaskError(f"The model has no parameter {missing[0]!r}; name weights as in model.named_parameters().")
        for name in block_maps:
            check_owners(model, name, parameters[name])
        shapes = {name: shape_of(parameters[name]) for name in block_maps}
        check_block_fits(block_size, shapes)
        blocks = {}
        for name, block_map in block_maps.items():
            check_weight(name, parameters[name])
            blocks[name] = BlockMask.from_block_map(block_map, matrix_shape(shapes[name]), block_size)
        return cls(blocks, model=model, config={"method": "by hand", "block_size": block_size})

    def bind(self, model: nn.Module) -> None:
        """Bind to `model` after checking that every masked weight is there in its shape.

        Raises:
            MaskError: the model lacks a masked weight or has it in another shape.
            ScopeError: a weight cannot carry blocks (quantised, split otherwise than by rows, on the meta device).
        """
        model = unwrap(model)
        parameters = named_weights(model)
        for name in self:
            if name in parameters:
                check_owners(model, name, parameters[name])
        self.check_shapes(parameters)
        for name, mask in self.items():
            check_weight(name, parameters[name])
            check_blocks_divide({name: parameters[name]}, mask.block_size)
        self._model = weakref.ref(model)

    def embed(self, model: nn.Module | None = None) -> nn.Module:
        """Put the trainable blocks into `model` (the bound one if left out) and freeze the masked weights.

        Other parameters keep their `requires_grad`; call `model.requires_grad_(False)` before, to train the blocks
        alone. Doing it twice with the same masks changes nothing.

        Returns:
            The model, changed in place.

        Raises:
            MaskError: the model lacks a masked weight or has it in another shape.
            ScopeError: a weight cannot carry blocks (quantised, split otherwise than by rows, on the meta device).
            EmbedError: the model carries other masks already, a module cannot carry blocks, DistributedDataParallel has
                wrapped the model, or the call is made under `torch.inference_mode()`. The model is as before then.
        """
        model = self._require_model() if model is None else model
        bound_before = self._model
        if self._model is None or unwrap(model) is not self._model():
            self._compare_base(unwrap(model))
        self.bind(model)
        try:
            embed(model, self, masks_config=self.config)
        except BaseException:
            self._model = bound_before
            raise
        return model

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable blocks `[nnz, b, b]` of the bound model in the order of the masks; embed if need be."""
        states = block_states(self.embed())
        return [states[name].blocks for name in self]

    def move(
        self,
        new: Mapping[str, BlockMask],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        carry: Carry = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        """Put the blocks of the weights in `new` at other places, as many as before, in place.

        Compiled graphs stay as they are. What blocks have learnt stays in the dense weights, rounded to their dtype,
        wherever blocks go; `unload_adapter` still restores the base. Call it after a step, without gradients.

        Args:
            new: weight name to its new blocks.
            optimizer: the optimizer of the blocks, where it has a state but has taken no step yet. Optimizers that have
                stepped the blocks are found without it.
            carry: "none": all blocks of these weights start with new optimizer states. "intersection": blocks that stay
                keep theirs; optimizers of `sylva_compile` alone can do that.
            generator: of the CPU; rounds what bfloat16 weights keep of leaving blocks stochastically.

        Raises:
            MaskError: the masks are not bound to a model, lack a name, or a weight would have another shape, block size
                or number of blocks.
            EmbedError: the blocks have gradients, or processes that train together would move blocks differently.
            ArgumentError: `optimizer` does not step the blocks, or cannot keep the states of blocks that stay.
                Nothing has moved in any of these cases.
        """
        move(self._require_model(), self._masks, new, optimizer, carry, generator)
        self.note(moves=self.config.get("moves", 0) + 1)

    def note(self, **entries: Any) -> None:
        """Add `entries` to `config`, which adapters of the model keep."""
        self.config |= entries
        for state in block_states(self._require_model()).values():
            state.masks_config |= entries

    def resume(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the blocks to where they were when a training was interrupted; a schedule's `load_state_dict` calls it.

        Args:
            saved: for each weight `positions int[2, nnz]`, `blocks [nnz, b, b]`, and `places int[2, k]` with their
                `originals [k, b, b]`: every place where blocks had been, and the values from before training there;
                and `outside`, the checksum of the base without these places.

        Raises:
            ArgumentError: these are other weights, other numbers of blocks or another base; nothing has changed then.
            EmbedError: the blocks have gradients; nothing has changed then.
        """
        resume(self.embed(), self._masks, saved)

    def follow(self) -> None:
        """Take over where the blocks of the bound model are: another than these masks has moved them."""
        states = block_states(self._require_model())
        self._masks |= {name: states[name].mask for name in self}

    def write_through(self) -> None:
        """Write the blocks into the dense weights now.

        Call it after a write that autograd does not see (`blocks.data`, a raw pointer). After optimizer steps and edits
        under `torch.no_grad()` the library writes them itself.
        """
        for state in block_states(self._require_model()).values():
            state.push()

    def summary(self) -> str:
        """Return a table with a line for each weight, and the totals."""
        return summary_of(self, self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as one safetensors file, beside `path` first and then renamed onto it.

        Raises MaskError where that cannot be written; an older file stays then.
        """
        positions = {name: mask.positions.to(torch.int32) for name, mask in self.items()}
        shapes = {name: [*mask.shape, mask.block_size] for name, mask in self.items()}
        _FILE.write(path, positions, {"shapes": shapes, "config": self.config})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read masks that `save` wrote; they are not bound to a model. Raises MaskError for any other file."""

        def make(positions: dict[str, Tensor], notes: dict[str, Any]) -> tuple[dict[str, BlockMask], dict[str, Any]]:
            blocks = {
                name: BlockMask((m, n), block_size, positions[name].to(torch.int64))
                for name, (m, n, block_size) in notes["shapes"].items()
            }
            return blocks, _current_words(notes["config"])

        blocks, config = _FILE.read(path, make)
        return cls(blocks, config=config)

    def _compare_base(self, model: nn.Module) -> None:
        """Log a warning if these masks were traced on other weights: they fit, but were not chosen for these."""
        parameters = named_weights(model)
        if block_states(model) or not all(name in parameters for name in self):
            return
        if is_other_base(self.config, tensors_of_bases(model, (parameters[name] for name in self))):
            log.warning(
                "These masks were chosen for other weights than this model's; trace again unless that is what you want."
            )


def _current_words(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` of a mask file in today's words: the greedy choice was first called "joint"."""
    return config | {"score": "greedy"} if config.get("score") == "joint" else config
