"""Optimizers for blocks and any other parameters, each one generated kernel a step."""

from sylva_compile.optim.optimizer import GeneratedOptimizer, StepOptions
from sylva_compile.optim.optimizers import SGD, Adam, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "GeneratedOptimizer", "Lion", "RMSprop", "StepOptions"]
