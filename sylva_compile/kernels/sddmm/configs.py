"""How the Triton SDDMM is launched: tile, warps and stages from a committed table, splits from the device.

Nothing is tuned while a model trains: `python benchmarks/sddmm.py --device cuda --tune` measures the table's entries on
the GPU at hand and writes `sddmm_configs.json` anew. Its key is `<dtype>/<panel>/<few or many>`: the block size rounded
up to a power of two of 16 to 128, and tokens up to or above `MANY`.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).with_suffix(".json")
MANY = 4096
PANELS = (16, 32, 64, 128)

_PROGRAMS_PER_CORE = 2
_SHORTEST_SEGMENT = 256


@dataclass(frozen=True)
class Config:
    """A launch: tokens of a tile, warps of a program, stages of its pipeline."""

    tokens: int
    warps: int
    stages: int


def config_key(dtype: torch.dtype, block_size: int, tokens: int) -> str:
    """The entry of the table that covers this shape."""
    panel = next((panel for panel in PANELS if panel >= block_size), PANELS[-1])
    return f"{str(dtype).removeprefix('torch.')}/{panel}/{'many' if tokens > MANY else 'few'}"


def choose_config(dtype: torch.dtype, block_size: int, tokens: int) -> Config:
    """The committed choice; the same for the same shape, whatever the device."""
    if block_size > PANELS[-1]:
        # No measured entry; a tile that still fits into the registers and the shared memory of a core.
        return Config(tokens=16, warps=8, stages=2)
    return _table()[config_key(dtype, block_size, tokens)]


def choose_splits(blocks: int, tokens: int, device: torch.device) -> int:
    """In how many parts the sum over `tokens` is taken, so that few blocks fill the device too."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = -(-_PROGRAMS_PER_CORE * cores // max(blocks, 1))
    return max(1, min(wanted, tokens // _SHORTEST_SEGMENT))


@functools.cache
def _table() -> dict[str, Config]:
    entries = json.loads(TABLE.read_text())["configs"]
    return {key: Config(**entry) for key, entry in entries.items()}
