"""Stage 1: run a model over some batches, observe its weight gradients, choose the blocks to train."""
