"""Estimators that watch a weight's inputs and output gradients and score its blocks."""
