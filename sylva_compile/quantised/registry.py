"""Find the format of a weight by the package of its type; no package is imported here that the model does not use."""

import importlib
from typing import Any

from torch import Tensor, nn

from sylva_compile.quantised.format import Format

_ROOMS = {"bitsandbytes": "sylva_compile.quantised.bitsandbytes", "torchao": "sylva_compile.quantised.torchao"}
"""The modules of this room that know formats, by the package whose types they know."""

_LOAD_OTHERWISE = "load the model unquantised, or as NF4 (BitsAndBytesConfig(load_in_4bit=True))"

_REFUSED = (
    (("gptq", "quantlinear"), "GPTQ"),
    (("awq", "wqlinear"), "AWQ"),
    (("gguf",), "GGUF"),
    (("mxfp4", "mxtensor"), "MXFP4"),
    (("nvfp4",), "NVFP4"),
    (("hqq",), "HQQ"),
    (("quanto",), "quanto"),
    (("fp8linear",), "FP8 (finegrained)"),
)
"""Parts of the names, in lower case, of types in which blocks cannot be trained, and the names of the formats."""


def format_of(weight: Any) -> Format | None:
    """Return the format of `weight`, a parameter; None for a dense one and for formats that nobody knows here."""
    room = _ROOMS.get(type(weight).__module__.partition(".")[0])
    if room is None:
        return None
    formats: tuple[Format, ...] = importlib.import_module(room).FORMATS
    return next((each for each in formats if each.matches(weight)), None)


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of `weight`; that before quantisation where it is quantised in a known format."""
    found = format_of(weight)
    return tuple(weight.shape) if found is None else found.shape(weight)


def refused_format(held: nn.Module | Tensor) -> str | None:
    """Return the name of a format that blocks cannot train in, of a weight or of a module that is no `nn.Linear`."""
    kind = type(held)
    words = f"{kind.__module__}.{kind.__name__}".lower()
    return next((name for parts, name in _REFUSED if any(part in words for part in parts)), None)


def refusal_text(name: str, kind: str) -> str:
    """Return the message that refuses the weight or module `name`, quantised as `kind`."""
    why = f"{name} is quantised as {kind}, in which blocks cannot be trained"
    return f"{why}; {_LOAD_OTHERWISE}, or leave it out of scope."
