"""The same model trained on the same data by every method of a grid, and what can be said of it."""
