"""Optimizers that step blocks, and any other parameters, by one generated kernel."""

from sylva_compile.optim.muon import Muon
from sylva_compile.optim.optimizer import GeneratedOptimizer, StepOptions
from sylva_compile.optim.optimizers import SGD, Adam, AdamW, Lion, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "GeneratedOptimizer", "Lion", "Muon", "RMSprop", "StepOptions"]
