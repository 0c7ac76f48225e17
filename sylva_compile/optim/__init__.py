"""Optimizers that step blocks, and any other parameters, by one generated kernel."""

from sylva_compile.optim.muon import Muon
from sylva_compile.optim.optimizer import GeneratedOptimizer
from sylva_compile.optim.optimizers import SGD, Adam, AdamW, Lion, RMSprop
from sylva_compile.optim.options import StepOptions

__all__ = ["SGD", "Adam", "AdamW", "GeneratedOptimizer", "Lion", "Muon", "RMSprop", "StepOptions"]
