"""N:M sparse pre-training (SLoPe): weights of which n of every m values are kept, in forward and backward pass."""
