"""The parts of generated Triton kernels that step blocks as matrices, one block a program."""

import triton
import triton.language as tl

from sylva_compile.kernels.step import triton_parts as parts


@triton.jit
def find_block(table, gradients, tiles, WIDTH: tl.constexpr):
    """Return the row of this program's block, the block's first element, and the address of the row's gradient."""
    tile = tiles + 2 * tl.program_id(0)
    number = tl.load(tile)
    return table + number * WIDTH, tl.load(tile + 1), tl.load(gradients + number)


@triton.jit
def place(row, start):
    """Return the block's first row and column in its dense weight, and its rows and columns inside of the weight.

    Blocks without a dense weight lie inside as a whole.
    """
    b = parts.column(row, parts.BLOCK)
    top, left, height, width = b * 0, b * 0, b, b
    if parts.column(row, parts.DENSE) != 0:
        positions = parts.column(row, parts.POSITIONS).to(tl.pointer_type(tl.int64)) + start // (b * b)
        top = tl.load(positions) * b
        left = tl.load(positions + parts.column(row, parts.BLOCKS)) * b
        height = tl.minimum(b, parts.column(row, parts.ROWS) - top)
        width = tl.minimum(b, parts.column(row, parts.COLS) - left)
    return top, left, height, width


@triton.jit
def own_step(row, start, t, AGES: tl.constexpr):
    """Return the number of this step since the states of this program's block started from zero; `t` unless AGES."""
    if AGES:
        born = parts.column(row, parts.BORN)
        block = start // (parts.column(row, parts.BLOCK) * parts.column(row, parts.BLOCK))
        t = t - tl.load(born.to(tl.pointer_type(tl.float32)) + block, mask=born != 0, other=0.0).to(tl.float64)
    return t


@triton.jit
def elements(row, start, height, width, SIDE: tl.constexpr):
    """Return the indices `[SIDE, SIDE]` of the block's elements in its parameter, and whether each is inside."""
    down, right = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    return start + down * parts.column(row, parts.BLOCK) + right, (down < height) & (right < width)


@triton.jit
def multiply(a, b, SIDE: tl.constexpr, PRODUCTS: tl.constexpr):
    """Return `a · b` of float32 `[SIDE, SIDE]`, with factors in bfloat16 or a precision that `tl.dot` knows."""
    if PRODUCTS == "bfloat16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif SIDE > 64:
        # In halves along the sum, so that shared memory holds the factors.
        a0, a1 = tl.split(tl.permute(tl.reshape(a, (SIDE, 2, SIDE // 2)), (0, 2, 1)))
        b0, b1 = tl.split(tl.permute(tl.reshape(b, (2, SIDE // 2, SIDE)), (1, 2, 0)))
        product = tl.dot(a1, b1, tl.dot(a0, b0, input_precision=PRODUCTS), input_precision=PRODUCTS)
    else:
        product = tl.dot(a, b, input_precision=PRODUCTS)
    return product


@triton.jit
def store_parameter(row, top, left, index, inside, value, SIDE: tl.constexpr):
    """Store the new block, and the dense weight's elements too where there is one."""
    parts.store(parts.column(row, parts.PARAM), parts.column(row, parts.PARAM_TYPE), index, inside, value)
    if parts.column(row, parts.DENSE) != 0:
        at_row, at_col = top + tl.arange(0, SIDE)[:, None], left + tl.arange(0, SIDE)[None, :]
        offset = at_row * parts.column(row, parts.ROW_STRIDE) + at_col * parts.column(row, parts.COL_STRIDE)
        # Blocks are float32 here, so `value` is exactly the parameter's new value.
        parts.store(parts.column(row, parts.DENSE), parts.column(row, parts.DENSE_TYPE), offset, inside, value)
