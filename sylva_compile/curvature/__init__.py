"""Estimators that gather statistics of a weight's inputs and output gradients and score its blocks."""
