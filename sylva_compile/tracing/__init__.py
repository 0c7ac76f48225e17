"""Trace a model: run it over some batches, observe its weight gradients, choose the blocks to train."""
