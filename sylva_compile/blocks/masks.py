"""`Masks`: the chosen blocks of a model's weights."""

import copy
import json
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sylva_compile.blocks.block_mask import BlockMask, check_block_fits
from sylva_compile.blocks.embed import block_states, embed
from sylva_compile.blocks.fingerprint import base_fingerprint
from sylva_compile.blocks.mask_summary import summary_of
from sylva_compile.blocks.moving import Carry, move, resume
from sylva_compile.blocks.scope import check_owners, check_weight, named_weights, unwrap
from sylva_compile.config import check_block_size
from sylva_compile.errors import MaskError
from sylva_compile.files import to_json, write_file
from sylva_compile.kernels.blocks import matrix_shape

log = logging.getLogger(__name__)

_FORMAT = "sylva-masks-1"


class Masks(Mapping[str, BlockMask]):
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
        self._blocks = dict(blocks)
        self.config: dict[str, Any] = dict(config or {})
        self._model: weakref.ref[nn.Module] | None = None
        if model is not None:
            self.bind(model)

    def __getitem__(self, name: str) -> BlockMask:
        return self._blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the model, since another process has another one; `embed(model)` binds again."""
        return self.__dict__ | {"_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Masks":
        """Copy; bound to the copy of the model where the model was copied before in the same call."""
        twin = Masks(copy.deepcopy(self._blocks, memo), config=copy.deepcopy(self.config, memo))
        model = None if self.model is None else memo.get(id(self.model))
        if model is not None:
            twin._model = weakref.ref(model)
        return twin

    def __repr__(self) -> str:
        nnz = sum(mask.nnz for mask in self.values())
        return f"Masks({len(self)} weights, {nnz} blocks, {'bound' if self.model is not None else 'not bound'})"

    @property
    def model(self) -> nn.Module | None:
        """The model that these masks are bound to, or None."""
        return self._model() if self._model is not None else None

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
        check_block_fits(block_size, {name: tuple(parameters[name].shape) for name in block_maps})
        blocks = {}
        for name, block_map in block_maps.items():
            check_weight(name, parameters[name])
            blocks[name] = BlockMask.from_block_map(block_map, matrix_shape(parameters[name].shape), block_size)
        return cls(blocks, model=model, config={"method": "by hand", "block_size": block_size})

    def bind(self, model: nn.Module) -> None:
        """Bind to `model` after checking that every masked weight is there in its shape.

        Raises:
            MaskError: the model lacks a masked weight or has it in another shape.
            ScopeError: a weight cannot carry blocks (quantised, split otherwise than by rows, on the meta device).
        """
        model = unwrap(model)
        parameters = named_weights(model)
        for name, mask in self.items():
            if name not in parameters:
                raise MaskError(f"These masks name {name!r}, which this model lacks; make masks for this model.")
            check_owners(model, name, parameters[name])
            if matrix_shape(parameters[name].shape) != mask.shape:
                found = tuple(parameters[name].shape)
                raise MaskError(f"{name} is {found} here and {mask.shape} in these masks; make masks for this model.")
        for name in self:
            check_weight(name, parameters[name])
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
        move(self._require_model(), self, new, optimizer, carry, generator)
        self._blocks |= new
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
                `originals [k, b, b]`: every place where blocks had been, and the values from before training there.

        Raises:
            ArgumentError: these are other weights, or other numbers of blocks; nothing has changed then.
            EmbedError: the blocks have gradients; nothing has changed then.
        """
        self._blocks |= resume(self.embed(), self, saved)

    def follow(self) -> None:
        """Take over where the blocks of the bound model are: another than these masks has moved them."""
        states = block_states(self._require_model())
        self._blocks |= {name: states[name].mask for name in self}

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
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, Any] = {}
        for name, mask in self.items():
            tensors[name] = mask.positions.to(torch.int32)
            shapes[name] = [*mask.shape, mask.block_size]
        metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "config": to_json(self.config)}
        try:
            write_file(Path(path), serialize(tensors, metadata))
        except OSError as error:
            raise MaskError(
                f"No masks can be written to {path} ({error}); name a file in a directory of yours."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Masks":
        """Read masks that `save` wrote; they are not bound to a model. Raises MaskError for any other file."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise MaskError(f"{path} holds no masks of this version; give a file written by Masks.save.")
                shapes = json.loads(metadata["shapes"])
                blocks = {}
                for name, (m, n, block_size) in shapes.items():
                    blocks[name] = BlockMask((m, n), block_size, file.get_tensor(name).to(torch.int64))
                return cls(blocks, config=_current_words(json.loads(metadata["config"])))
        except FileNotFoundError:
            raise MaskError(f"{path} does not exist; give a file written by Masks.save.") from None
        except OSError as error:
            raise MaskError(f"{path} cannot be read ({error}); give a file written by Masks.save.") from error
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, MaskError):
                raise
            raise MaskError(f"{path} is damaged or no mask file ({error}); make the masks again.") from error

    def _compare_base(self, model: nn.Module) -> None:
        """Log a warning if these masks were traced on other weights: they fit, but were not chosen for these."""
        parameters = named_weights(model)
        wanted = self.config.get("base")
        if wanted is None or block_states(model) or not all(name in parameters for name in self):
            return
        if base_fingerprint(parameters[name] for name in self) != wanted:
            log.warning(
                "These masks were chosen for other weights than this model's; trace again unless that is what you want."
            )

    def _require_model(self) -> nn.Module:
        model = self.model
        if model is None:
            raise MaskError("These masks are not bound to a living model; call masks.embed(model) with the model.")
        return model


def _current_words(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` of a mask file in today's words: the greedy choice was first called "joint"."""
    return config | {"score": "greedy"} if config.get("score") == "joint" else config
