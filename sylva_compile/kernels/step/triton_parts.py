"""The parts that all generated Triton kernels share: tiles, loads and stores of any dtype, write-through, rounding.

`memory.cpp` and `launch.cpp` hold the same parts in C++. The Triton source runs on the CPU under `TRITON_INTERPRET=1`,
which must be set before this module is imported.
"""

import triton
import triton.language as tl

from sylva_compile.kernels.step.table import COLUMNS, STATE_COLUMNS, STOCHASTIC, TYPES

PARAM = tl.constexpr(COLUMNS.index("PARAM"))
PARAM_TYPE = tl.constexpr(COLUMNS.index("PARAM_TYPE"))
GRAD_TYPE = tl.constexpr(COLUMNS.index("GRAD_TYPE"))
COUNT = tl.constexpr(COLUMNS.index("COUNT"))
HYPER = tl.constexpr(COLUMNS.index("HYPER"))
STEP = tl.constexpr(COLUMNS.index("STEP"))
BORN = tl.constexpr(COLUMNS.index("BORN"))
INDEX = tl.constexpr(COLUMNS.index("INDEX"))
DENSE = tl.constexpr(COLUMNS.index("DENSE"))
DENSE_TYPE = tl.constexpr(COLUMNS.index("DENSE_TYPE"))
ROW_STRIDE = tl.constexpr(COLUMNS.index("ROW_STRIDE"))
COL_STRIDE = tl.constexpr(COLUMNS.index("COL_STRIDE"))
ROWS = tl.constexpr(COLUMNS.index("ROWS"))
COLS = tl.constexpr(COLUMNS.index("COLS"))
BLOCK = tl.constexpr(COLUMNS.index("BLOCK"))
POSITIONS = tl.constexpr(COLUMNS.index("POSITIONS"))
BLOCKS = tl.constexpr(COLUMNS.index("BLOCKS"))
STATES = tl.constexpr(len(COLUMNS))
STATE_WIDTH = tl.constexpr(len(STATE_COLUMNS))
_FLOAT32, _BFLOAT16, _FLOAT16, _STOCHASTIC = map(tl.constexpr, [*list(TYPES.values())[:3], STOCHASTIC])


@triton.jit
def maximum(a, b):
    """Return the larger, or NaN if `a` is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def sign(a):
    """Return 1, 0 or -1; 0 for NaN, as torch does."""
    return (a > 0).to(tl.float32) - (a < 0).to(tl.float32)


@triton.jit
def power(base, exponent):
    """Return a power of a base that is not negative."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def column(row, number):
    """Load column `number` of a row of the table."""
    return tl.load(row + number)


@triton.jit
def find_tile(table, tiles, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Return the row of this program's tile, its first element, and the indices of its elements in the parameter."""
    tile = tiles + 2 * tl.program_id(0)
    start = tl.load(tile + 1)
    return table + tl.load(tile) * WIDTH, start, start + tl.arange(0, TILE)


@triton.jit
def _place(row, start, TILE: tl.constexpr):
    """Return each element's row and column in the dense weight."""
    b = column(row, BLOCK)
    block = start // (b * b)
    # 64-bit divisions would take longer than the memory accesses; a block that SDDMM can hold needs only 32 bits.
    side = b.to(tl.int32)
    local = (start - block * b * b).to(tl.int32) + tl.arange(0, TILE)
    further = local // (side * side)
    within = local - further * side * side
    inside = start + tl.arange(0, TILE) < column(row, COUNT)
    positions = column(row, POSITIONS).to(tl.pointer_type(tl.int64)) + block
    top = tl.load(positions + further, mask=inside, other=0) * b
    left = tl.load(positions + column(row, BLOCKS) + further, mask=inside, other=0) * b
    return top + within // side, left + within % side


@triton.jit
def within_matrix(row, start, index, TILE: tl.constexpr):
    """Return whether each element of the tile exists and, for blocks, lies inside the dense weight."""
    inside = index < column(row, COUNT)
    if column(row, DENSE) != 0:
        at_row, at_col = _place(row, start, TILE)
        inside = inside & (at_row < column(row, ROWS)) & (at_col < column(row, COLS))
    return inside


@triton.jit
def load(address, code, index, inside):
    """Load elements of any dtype as float32."""
    if code == _FLOAT32:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + index, mask=inside, other=0.0)
    elif code == _FLOAT16:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + index, mask=inside, other=0.0).to(tl.float32)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.uint16)) + index, mask=inside, other=0)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def store(address, code, index, inside, value):
    """Store float32 values, rounded to nearest, in any dtype."""
    if code == _FLOAT32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + index, value, mask=inside)
    elif code == _FLOAT16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + index, value.to(tl.float16), mask=inside)
    else:
        # Integer arithmetic rounds alike everywhere; the interpreter, which stores bfloat16 as integers, would not.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value != value, 0x7FC0, nearest)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + index, nearest.to(tl.uint16), mask=inside)


@triton.jit
def store_parameter(row, start, index, inside, value, TILE: tl.constexpr):
    """Store the new values, and for blocks the dense weight's elements too."""
    store(column(row, PARAM), column(row, PARAM_TYPE), index, inside, value)
    if column(row, DENSE) != 0:
        at_row, at_col = _place(row, start, TILE)
        offset = at_row * column(row, ROW_STRIDE) + at_col * column(row, COL_STRIDE)
        # Blocks are float32 here, so `value` is exactly the parameter's new value.
        store(column(row, DENSE), column(row, DENSE_TYPE), offset, inside, value)


@triton.jit
def load_step(row):
    """Return the number of this step, from 1, in float64; the caller has advanced the counts before the launch."""
    t = tl.full((), 1.0, tl.float64)
    if column(row, STEP) != 0:
        t = tl.load(column(row, STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)
    return t


@triton.jit
def own_steps(row, start, index, t, TILE: tl.constexpr, AGES: tl.constexpr):
    """Return the number of this step for the block of each element; it is `t`, one number, unless AGES.

    The number counts from 1 since the states of the block started from zero.
    """
    if AGES:
        area = tl.maximum(column(row, BLOCK) * column(row, BLOCK), 1)
        block = start // area
        # As in `_place`, divide in 32 bits.
        further = ((start - block * area).to(tl.int32) + tl.arange(0, TILE)) // area.to(tl.int32)
        born = column(row, BORN).to(tl.pointer_type(tl.float32)) + block
        known = (index < column(row, COUNT)) & (column(row, BORN) != 0)
        t = t - tl.load(born + further, mask=known, other=0.0).to(tl.float64)
    return t


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def load_state(row, NUMBER: tl.constexpr, index, inside):
    """Load elements of the state with index `NUMBER` as float32."""
    at = row + STATES + STATE_WIDTH * NUMBER
    return load(tl.load(at), tl.load(at + 1), index, inside)


@triton.jit
def store_state(row, NUMBER: tl.constexpr, index, inside, value, seed, t):
    """Store the state's new values; `seed` and the step `t` choose the random bits of stochastic rounding."""
    at = row + STATES + STATE_WIDTH * NUMBER
    address, code = tl.load(at), tl.load(at + 1)
    if code == _STOCHASTIC:
        # Triton passes a seed of 1 as a constant and a large seed as 64 bits.
        key = _mix((t.to(tl.int64) ^ seed).to(tl.uint32))
        key = _mix(_mix(key + column(row, INDEX).to(tl.uint32)) + tl.full((), NUMBER, tl.uint32))
        random = _mix(_mix(index.to(tl.uint32) ^ key) + (index >> 32).to(tl.uint32))
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        chosen = tl.where(finite, (bits + (random & 0xFFFF)) & 0xFFFF0000, bits)
        store(address, _BFLOAT16, index, inside, chosen.to(tl.float32, bitcast=True))
    else:
        store(address, code, index, inside, value)


@triton.jit
def squares_kernel(table, gradients, tiles, sums, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCKS_ALONE: tl.constexpr):
    """Store the sum of squares of each tile's gradient, in float64; not finite where an element is not.

    A tile is TILE elements, or one block of at most as many if BLOCKS_ALONE.
    """
    row, start, index = find_tile(table, tiles, WIDTH, TILE)
    end = column(row, COUNT)
    if BLOCKS_ALONE:
        end = start + column(row, BLOCK) * column(row, BLOCK)
    gradient = tl.load(gradients + tl.load(tiles + 2 * tl.program_id(0)))
    total = tl.full((), 0.0, tl.float64)
    if gradient != 0:
        value = load(gradient, column(row, GRAD_TYPE), index, index < end).to(tl.float64)
        total = tl.sum(value * value)
    tl.store(sums + tl.program_id(0), total)
