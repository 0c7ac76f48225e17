"""The places of a weight's blocks in a distributed checkpoint: the base there, and what blocks have left behind.

A checkpoint holds the values from before training of every place that was trained. So the base is known even where a
state dict of the model, loaded before, has put trained values there; a checksum compares all the other values.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.fingerprint import checksum
from sylva_compile.blocks.originals import Originals
from sylva_compile.blocks.shards import whole


def base_at_blocks(state: BlockState) -> Tensor:
    """Return the values from before training where blocks are now, `[nnz, b, b]` on the CPU."""
    return state.originals.at(state.mask.positions)


def left_behind(state: BlockState) -> bytes:
    """Return where blocks have been and are no more, with the values before training and now; b"" for nowhere."""
    left, values = state.left_behind()
    return packed({"places": left, "originals": state.originals.at(left), "values": values}) if left.shape[1] else b""


class SavedPlaces:
    """The places of one weight in a checkpoint, with their base values; the values of its blocks are beside them."""

    def __init__(self, mask: BlockMask, originals: Tensor, left: bytes) -> None:
        """Take the mask of then, and what `base_at_blocks` and `left_behind` returned then."""
        self.mask = mask
        known = unpacked(left)
        self._places, self._values = known.get("places", mask.positions[:, :0]), known.get("values")
        self._originals = [(mask.positions, originals)]
        if known:
            self._originals.append((self._places, known["originals"]))

    def base(self, state: BlockState) -> str:
        """Return the checksum of the base of `state`, as far as it and the checkpoint know it; nothing is changed."""
        dense = state.weight.detach().clone()
        self._base_places(state).restore(dense)
        return checksum(dense)

    def put_into(self, state: BlockState, blocks: Tensor) -> None:
        """Let `state`, whose base has the right checksum, be as it was then, with the values `blocks [nnz, b, b]`."""
        state.originals = self._base_places(state)
        state.take_trained(whole(blocks.to(state.blocks.device)), self._places, self._values, self.mask)
        state.base_known = True

    def _base_places(self, state: BlockState) -> Originals:
        """Return the values from before training at all places that were trained then, or in this process."""
        found = Originals(state.weight, self._places[:, :0], self.mask.block_size)
        for positions, values in self._originals:
            found.put(positions, values)
        found.put_missing(state.originals)
        return found


def packed(value: Any) -> bytes:
    """Return plain values and tensors as bytes, which `torch.distributed.checkpoint` takes in any size."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(content: bytes) -> Mapping[str, Any]:
    """Return what `packed` has packed; nothing for no bytes."""
    if not content:
        return {}
    # `torch.distributed.checkpoint` has unpickled the bytes themselves, so this trusts the checkpoint no further.
    found: Mapping[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    return found
