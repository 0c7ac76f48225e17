"""Kernels whose module is imported when they are first called.

A custom op's schema, fake and reference import torch alone. Its kernels need Triton or a C++ compiler, which a machine
may lack or a process may never use.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any


def on_first_call(module: str, name: str) -> Callable[..., Any]:
    """Return a function that stands for the function `name` of `module`.

    Its first call imports the module; each call passes its arguments on and returns the result.

    Args:
        module: the full name of the module, such as `"sylva_compile.kernels.sddmm.cpu"`.
        name: a function at the top level of that module.

    Returns:
        The function. A call raises ImportError or AttributeError where the module or its function cannot be found.
    """

    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def call(*arguments: Any, **options: Any) -> Any:
        return load()(*arguments, **options)

    return call
