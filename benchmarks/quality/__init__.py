"""The same model trained on the same data by every method of a grid, and the tables of the results."""
