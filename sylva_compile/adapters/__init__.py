"""Adapters: the trained blocks and where they sit, on disk; saving, loading, unloading and merging them."""
