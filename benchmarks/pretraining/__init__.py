"""Pre-training a small GPT-2 from scratch: dense, with N:M weights (SLoPe), and with adapters in the last steps."""
