"""The version, as a constant, so that a checkout on `sys.path` works without an installed package."""

__version__ = "0.1.0"
