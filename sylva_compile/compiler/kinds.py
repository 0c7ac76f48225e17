"""All kinds of embedded weights; another kind is one more entry."""

from sylva_compile.blocks.kind import BLOCKS
from sylva_compile.nm.kind import NM

KINDS = (BLOCKS, NM)
