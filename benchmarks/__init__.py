"""Benchmarks of speed, memory and quality, started as modules from the root: `python -m benchmarks.step`."""
