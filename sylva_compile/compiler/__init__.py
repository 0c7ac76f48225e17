"""The `torch.compile` backend, the wrapper that runs before each compiled graph, and the report."""
