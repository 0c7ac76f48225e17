"""The `torch.compile` backend: what it compiles, what runs before each compiled call, what it reports."""
