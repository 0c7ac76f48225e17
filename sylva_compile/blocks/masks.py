"""`BlockMask`, the chosen blocks of one weight, and `Masks`, those of a model."""

import copy
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from sylva_compile.blocks import embedding
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.scope import check_weight, named_weights, unwrap
from sylva_compile.errors import ArgumentError, MaskError
from sylva_compile.files import write_file
from sylva_compile.kernels.blocks import grid_shape

log = logging.getLogger(__name__)

_FORMAT = "sylva-masks-1"


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The chosen blocks of one weight.

    Attributes:
        shape: `(m, n)` of the weight as stored.
        block_size: b.
        rows, cols: `int64[nnz]` on the CPU, block coordinates, sorted by row, then column.
    """

    shape: tuple[int, int]
    block_size: int
    rows: Tensor
    cols: Tensor

    def __post_init__(self) -> None:
        rows, cols = grid_shape(self.shape, self.block_size)
        if self.rows.shape != self.cols.shape or {self.rows.dtype, self.cols.dtype} != {torch.int64}:
            raise MaskError(
                f"Rows {tuple(self.rows.shape)} of {self.rows.dtype} and columns {tuple(self.cols.shape)} of "
                f"{self.cols.dtype} of a mask must be as many, of int64; make it with BlockMask.from_block_map."
            )
        place = self.rows * cols + self.cols
        inside = (self.rows >= 0) & (self.rows < rows) & (self.cols >= 0) & (self.cols < cols)
        if not bool(inside.all()) or not bool((place[1:] > place[:-1]).all()):
            raise MaskError(
                f"Blocks of a mask of shape {self.shape} must lie in its {rows} x {cols} grid, sorted by row and "
                "column, each once; make it with BlockMask.from_block_map."
            )

    @classmethod
    def from_block_map(cls, block_map: Tensor, shape: tuple[int, int] | torch.Size, block_size: int) -> "BlockMask":
        """From `block_map bool[ceil(m/b), ceil(n/b)]`. Raises MaskError where that shape is another."""
        shape = (int(shape[0]), int(shape[1]))
        grid = grid_shape(shape, block_size)
        if tuple(block_map.shape) != grid:
            raise MaskError(
                f"A block map of shape {tuple(block_map.shape)} does not tile a weight of shape {shape} with blocks of "
                f"{block_size}; make it {grid}."
            )
        rows, cols = block_map.detach().to("cpu", torch.bool).nonzero(as_tuple=True)
        return cls(shape, block_size, rows, cols)

    @property
    def nnz(self) -> int:
        """Number of blocks."""
        return self.rows.numel()

    @property
    def trainable(self) -> int:
        """Number of weight elements that the blocks cover, without what reaches over the edge."""
        b, (m, n) = self.block_size, self.shape
        return int(((m - self.rows * b).clamp(max=b) * (n - self.cols * b).clamp(max=b)).sum())

    def block_map(self) -> Tensor:
        """`bool[ceil(m/b), ceil(n/b)]`, true where a block is trained."""
        chosen = torch.zeros(grid_shape(self.shape, self.block_size), dtype=torch.bool, device="cpu")
        chosen[self.rows, self.cols] = True
        return chosen

    def dense(self) -> Tensor:
        """`bool[m, n]`, true where an element is trained."""
        b, (m, n) = self.block_size, self.shape
        return self.block_map().repeat_interleave(b, 0)[:m].repeat_interleave(b, 1)[:, :n]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMask):
            return NotImplemented
        return (
            (self.shape, self.block_size) == (other.shape, other.block_size)
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.cols, other.cols)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        total = self.block_map().numel()
        return f"BlockMask(shape={self.shape}, block_size={self.block_size}, nnz={self.nnz} of {total})"


def check_block_size(block_size: int) -> None:
    """Raise ArgumentError unless `block_size` is an integer of 8 or more."""
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 8:
        raise ArgumentError(f"block_size={block_size!r}; use an integer of 8 or more (16 to 128 is usual).")


class Masks(Mapping[str, BlockMask]):
    """The masks of a model: a mapping from weight name to `BlockMask`, usually bound to the model it was made for."""

    def __init__(
        self,
        blocks: Mapping[str, BlockMask],
        *,
        model: nn.Module | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`config` says how the masks were made; it is saved with them. `model` binds them without keeping it alive."""
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
        """Without the model, which another process or a copy has none of; `embed(model)` binds again."""
        return self.__dict__ | {"_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Masks":
        """Bound to the copy of the model where both are copied together, the model first."""
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
        """Masks made by hand, bound to `model`.

        Args:
            model: the model whose weights are named.
            block_maps: weight name to `bool[ceil(m/b), ceil(n/b)]`.
            block_size: b, 8 or more.

        Raises:
            ArgumentError: a block size below 8, or larger than every dimension of every weight named.
            MaskError: a name that the model lacks, or a map of another shape.
        """
        check_block_size(block_size)
        parameters = named_weights(model)
        missing = [name for name in block_maps if name not in parameters]
        if missing:
            raise MaskError(f"The model has no parameter {missing[0]!r}; name weights as in model.named_parameters().")
        check_block_fits(block_size, {name: parameters[name] for name in block_maps})
        blocks = {}
        for name, block_map in block_maps.items():
            check_weight(name, parameters[name])
            blocks[name] = BlockMask.from_block_map(block_map, parameters[name].shape, block_size)
        return cls(blocks, model=model, config={"method": "by hand", "block_size": block_size})

    def bind(self, model: nn.Module) -> None:
        """Bind to `model` after checking that every masked weight is there in its shape. Raises MaskError otherwise."""
        model = unwrap(model)
        parameters = named_weights(model)
        for name, mask in self.items():
            if name not in parameters:
                raise MaskError(f"These masks name {name!r}, which this model lacks; make masks for this model.")
            if tuple(parameters[name].shape) != mask.shape:
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
            EmbedError: the model carries other masks already.
        """
        model = self._require_model() if model is None else model
        bound_before = self._model
        if self._model is None or unwrap(model) is not self._model():
            self._compare_base(unwrap(model))
        self.bind(model)
        try:
            embedding.embed(model, self)
        except BaseException:
            self._model = bound_before
            raise
        return model

    def parameters(self) -> list[nn.Parameter]:
        """The trainable blocks `[nnz, b, b]` of the bound model, in the order of the masks; embeds them if need be."""
        sites = embedding.sites(self.embed())
        return [sites[name].blocks for name in self]

    def write_through(self) -> None:
        """Write the blocks into the dense weights now.

        Needed only after a write that autograd does not see (`blocks.data`, a raw pointer): optimizer steps and edits
        under `torch.no_grad()` are followed by themselves.
        """
        for site in embedding.sites(self._require_model()).values():
            site.write()

    def summary(self) -> str:
        """A table: a line a weight, and the totals."""
        width = max((len(name) for name in self), default=6)
        lines = [f"{'weight':<{width}}  {'shape':>14}  {'blocks':>13}  {'trained':>8}"]
        total = trained = 0
        for name, mask in self.items():
            size = mask.shape[0] * mask.shape[1]
            total, trained = total + size, trained + mask.trainable
            grid = grid_shape(mask.shape, mask.block_size)
            blocks = f"{mask.nnz}/{grid[0] * grid[1]}"
            shape = f"{mask.shape[0]} x {mask.shape[1]}"
            lines.append(f"{name:<{width}}  {shape:>14}  {blocks:>13}  {mask.trainable / max(size, 1):>8.2%}")
        share = trained / max(total, 1)
        lines.append(f"{len(self)} weights, {trained:,} of {total:,} elements trained ({share:.2%}).")
        if self.model is not None:
            masked = {id(parameter) for name, parameter in self.model.named_parameters() if name in self._blocks}
            masked |= {id(site.blocks) for site in embedding.sites(self.model).values()}
            others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in masked]
            if others:
                count = sum(p.numel() for p in others)
                lines.append(f"{count:,} elements outside the masks require grad (biases, norms, heads, embeddings).")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks as one safetensors file, beside `path` first and then renamed onto it.

        Raises MaskError where that cannot be written; an older file stays then.
        """
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, Any] = {}
        for name, mask in self.items():
            tensors[name] = torch.stack([mask.rows, mask.cols]).to(torch.int32)
            shapes[name] = [*mask.shape, mask.block_size]
        metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "config": json.dumps(self.config, default=float)}
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
                    rows, cols = file.get_tensor(name).to(torch.int64)
                    blocks[name] = BlockMask((m, n), block_size, rows, cols)
                return cls(blocks, config=json.loads(metadata["config"]))
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
        if wanted is None or embedding.sites(model) or not all(name in parameters for name in self):
            return
        if base_fingerprint(parameters[name] for name in self) != wanted:
            log.warning(
                "These masks were chosen for other weights than this model's; trace again if that is no intent."
            )

    def _require_model(self) -> nn.Module:
        model = self.model
        if model is None:
            raise MaskError("These masks are not bound to a living model; call masks.embed(model) with the model.")
        return model


def check_block_fits(block_size: int, weights: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError if a block is larger than every dimension of every weight."""
    largest = max((size for weight in weights.values() for size in weight.shape), default=0)
    if weights and block_size > largest:
        raise ArgumentError(
            f"block_size={block_size} is larger than every dimension in scope (at most {largest}); use a smaller one."
        )


def base_fingerprint(weights: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that depend on every bit of `weights`, in this order."""
    return hashlib.sha256("".join(map(checksum, weights)).encode()).hexdigest()[:16]
