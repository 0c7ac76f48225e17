"""Launch parameters of the Triton SDDMM: tile, warps and stages from a committed table, splits from the device.

No kernel is tuned while a model trains: `python -m benchmarks.sddmm --device cuda --tune` measures the table's entries
on the GPU at hand and rewrites `configs.json`. An entry's key is `<dtype>/<panel>/<few or many>`: the panel is the
block size rounded up to a power of two from 16 to 128, and "many" stands for more than `MANY` tokens.
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
    """Parameters of a launch.

    Attributes:
        tokens: tokens a tile.
        warps: warps a program.
        stages: stages of a program's software pipeline.
    """

    tokens: int
    warps: int
    stages: int


def config_key(dtype: torch.dtype, block_size: int, tokens: int) -> str:
    """Return the key of the table's entry for this shape."""
    panel = next((panel for panel in PANELS if panel >= block_size), PANELS[-1])
    return f"{str(dtype).removeprefix('torch.')}/{panel}/{'many' if tokens > MANY else 'few'}"


def choose_config(dtype: torch.dtype, block_size: int, tokens: int) -> Config:
    """Return the table's entry for this shape, the same on every device."""
    if block_size > PANELS[-1]:
        # The table has no entry; this tile still fits into the registers and the shared memory of a core.
        return Config(tokens=16, warps=8, stages=2)
    return _table()[config_key(dtype, block_size, tokens)]


def choose_splits(blocks: int, tokens: int, device: torch.device) -> int:
    """Return the number of parts of the sum over `tokens`, chosen so that few blocks fill the device too."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = -(-_PROGRAMS_PER_CORE * cores // max(blocks, 1))
    return max(1, min(wanted, tokens // _SHORTEST_SEGMENT))


@functools.cache
def _table() -> dict[str, Config]:
    entries = json.loads(TABLE.read_text())["configs"]
    return {key: Config(**entry) for key, entry in entries.items()}
