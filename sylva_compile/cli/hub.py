"""Names on the Hugging Face hub."""

import re

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def may_be_on_the_hub(name: str) -> bool:
    """Whether `name` has the form of a model's or a data set's name: "gpt2" or "owner/name"."""
    return name not in (".", "..") and _NAME.fullmatch(name) is not None
