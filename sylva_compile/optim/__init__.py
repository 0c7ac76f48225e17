"""Optimizers for blocks."""

from sylva_compile.optim.optimizer import AdamW

__all__ = ["AdamW"]
