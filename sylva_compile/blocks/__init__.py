"""Stage 2, what is trained: the blocks of each weight, and the modules that carry them inside frozen weights."""
