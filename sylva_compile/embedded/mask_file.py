"""`MaskFile`: the file of a model's masks, in safetensors, with a tensor for each weight and notes as JSON."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from sylva_compile.errors import MaskError
from sylva_compile.files import to_json, write_file

T = TypeVar("T")


@dataclass(frozen=True)
class MaskFile:
    """One format of files.

    Attributes:
        format: its name and version.
        holds: the name of what it holds, for messages: "masks".
        written_by: the method that writes it, for messages: "Masks.save".
        older: other versions that can be read.
    """

    format: str
    holds: str
    written_by: str
    older: tuple[str, ...] = ()

    def write(self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write `tensors`, by weight name, and `notes`, each as JSON; beside `path` first and then renamed onto it.

        Raises MaskError where that cannot be written; an older file stays then.
        """
        metadata = {"format": self.format, **{key: to_json(value) for key, value in notes.items()}}
        try:
            write_file(Path(path), serialize(dict(tensors), metadata))
        except OSError as error:
            raise MaskError(
                f"No masks can be written to {path} ({error}); name a file in a directory of yours."
            ) from error

    def read(self, path: str | os.PathLike[str], make: Callable[[dict[str, Tensor], dict[str, Any]], T]) -> T:
        """Return what `make` makes of the tensors and notes that `write` was given.

        Raises:
            MaskError: there is no such file, or it is another one, or damaged: `make` may raise KeyError, ValueError
                and TypeError for what it does not find.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                if metadata.pop("format", None) not in (self.format, *self.older):
                    raise MaskError(
                        f"{path} holds no {self.holds} of this version; give a file written by {self.written_by}."
                    )
                notes = {key: json.loads(text) for key, text in metadata.items()}
                return make({name: file.get_tensor(name) for name in file.keys()}, notes)  # noqa: SIM118
        except FileNotFoundError:
            raise MaskError(f"{path} does not exist; give a file written by {self.written_by}.") from None
        except OSError as error:
            raise MaskError(f"{path} cannot be read ({error}); give a file written by {self.written_by}.") from error
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, MaskError):
                raise
            raise MaskError(f"{path} is damaged or no mask file ({error}); make the masks again.") from error
