"""`KnownBase`: whether the values from before training that a state keeps still belong to its weight."""

import torch
from torch import nn

from sylva_compile.blocks.shards import is_sharded
from sylva_compile.errors import EmbedError


class KnownBase:
    """The base's checksum, and whether the weight still has that base.

    An edit of the dense weight in place casts doubt on it. The doubt is settled when somebody needs the base, for that
    reads the whole weight, and a moving average edits it at every step: an edit at places that blocks have trained
    leaves the base as it was, and so does one that writes the values that are there already.

    Attributes:
        base_mark: the base's checksum; None where processes hold parts of the weight: any edit makes it unknown there.
    """

    name: str
    weight: nn.Parameter
    _known = True
    _in_doubt = False
    base_mark: str | None = None
    _marked_dtype: torch.dtype | None = None

    @property
    def base_known(self) -> bool:
        """Whether `originals` still belong to the weight; after an edit in place, this compares all values."""
        self.settle_doubt()
        return self._known

    @base_known.setter
    def base_known(self, known: bool) -> None:
        self._known, self._in_doubt = known, False

    def settle_doubt(self) -> None:
        """Find out whether edits in place have changed the base, before the weight is converted, say."""
        if self._in_doubt and self.weight.device.type != "meta":
            self.base_known = self._known and self._has_base()

    def doubt_base(self) -> None:
        """Note that the dense weight was edited in place."""
        self._in_doubt = True

    def mark_base(self) -> None:
        """Take the base that the weight has now for the known one."""
        absent = is_sharded(self.weight) or self.weight.device.type == "meta"
        self.base_known, self.base_mark = True, None if absent else self.base_checksum()
        self._marked_dtype = self.weight.dtype

    def follow_conversion(self) -> None:
        """Take the converted base for the known one, where the weight has another dtype now."""
        if self._known and self._marked_dtype is not self.weight.dtype:
            self.mark_base()

    def base_checksum(self) -> str:
        """Return the checksum of the base."""
        raise NotImplementedError

    def check_base_known(self) -> None:
        """Raise EmbedError if an edit in place of the dense weight has changed its base."""
        if not self.base_known:
            raise EmbedError(
                f"{self.name} was changed in place since its blocks were embedded, so its base is not known; load the "
                "base's state dict first, or call merge_and_unload(model) to keep the values."
            )

    def _has_base(self) -> bool:
        return not is_sharded(self.weight) and self.base_mark is not None and self.base_checksum() == self.base_mark
