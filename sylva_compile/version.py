"""The version, known without an installed package, so that a checkout on the path works too."""

__version__ = "0.1.0"
