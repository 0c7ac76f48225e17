from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sylva_compile.kernels.blocks import BlockCopier, BlockWriter, block_dtype, grid_shape, read_blocks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def slow_read(matrix: Tensor, positions: Tensor, b: int) -> Tensor:
    out = torch.zeros(positions.shape[1], b, b, dtype=matrix.dtype)
    for k, (row, col) in enumerate(positions.t().tolist()):
        for i in range(row * b, min((row + 1) * b, matrix.shape[0])):
            width = len(matrix[i, col * b : (col + 1) * b])
            out[k, i - row * b, :width] = matrix[i, col * b : col * b + width]
    return out


def slow_write(matrix: Tensor, positions: Tensor, b: int, blocks: Tensor) -> None:
    for k, (row, col) in enumerate(positions.t().tolist()):
        for i in range(row * b, min((row + 1) * b, matrix.shape[0])):
            width = len(matrix[i, col * b : (col + 1) * b])
            matrix[i, col * b : col * b + width] = blocks[k, i - row * b, :width].to(matrix.dtype)


@dataclass
class Case:
    """A matrix `[m, n]` as one of several views into a larger buffer, and some of its blocks."""

    buffer: Tensor
    m: int
    n: int
    layout: str
    positions: Tensor
    block_size: int

    def matrix(self, buffer: Tensor) -> Tensor:
        if self.layout == "contiguous":
            return buffer[: self.m * self.n].view(self.m, self.n)
        if self.layout == "transposed":
            return buffer[: self.m * self.n].view(self.n, self.m).t()
        # Rows lie apart, columns lie apart, and the first element is not the buffer's first.
        return buffer.as_strided((self.m, self.n), (2 * self.n + 3, 2), 5)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    b = draw(st.sampled_from([8, 16, 32, 64, 128]) | st.integers(8, 128))
    m, n = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    # Random bits: infinities, negative zeros and NaNs with a payload have to survive too.
    low, high = torch.iinfo(BITS[dtype]).min, torch.iinfo(BITS[dtype]).max
    size = (2 * n + 3) * m + 2 * n + 8
    buffer = torch.randint(low, high, (size,), dtype=BITS[dtype], generator=generator).view(dtype)
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    positions = (torch.rand(-(-m // b), -(-n // b), generator=generator) < density).nonzero().t()
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    return Case(buffer, m, n, layout, positions, b)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.dtype])


@given(cases())
@settings(deadline=None, max_examples=150)
def test_read_copies_the_blocks_bit_for_bit_and_zeros_beyond_the_edges(case: Case) -> None:
    matrix = case.matrix(case.buffer)
    found = read_blocks(matrix, case.positions, case.block_size)
    assert found.dtype == matrix.dtype
    assert torch.equal(bits(found), bits(slow_read(matrix, case.positions, case.block_size)))


@given(cases())
@settings(deadline=None, max_examples=150)
def test_write_changes_the_blocks_and_nothing_else_bit_for_bit(case: Case) -> None:
    b = case.block_size
    wide = block_dtype(case.buffer.dtype)
    blocks = torch.randn(case.positions.shape[1], b, b, dtype=wide, generator=torch.Generator().manual_seed(1))
    expected = case.buffer.clone()
    slow_write(case.matrix(expected), case.positions, b, blocks)
    found = case.buffer.clone()
    BlockWriter((case.m, case.n), case.positions, b).write(case.matrix(found), blocks)
    assert torch.equal(bits(found), bits(expected))


@given(cases())
@settings(deadline=None, max_examples=100)
def test_reading_what_was_written_gives_it_back_rounded(case: Case) -> None:
    matrix = case.matrix(case.buffer)
    wide = block_dtype(matrix.dtype)
    blocks = torch.randn(case.positions.shape[1], case.block_size, case.block_size, dtype=wide)
    BlockWriter(matrix.shape, case.positions, case.block_size).write(matrix, blocks)
    found = read_blocks(matrix, case.positions, case.block_size)
    inside = slow_read(torch.ones(case.m, case.n), case.positions, case.block_size).bool()
    assert torch.equal(found[inside], blocks.to(matrix.dtype)[inside])
    assert not found[~inside].any()


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_copier_reads_and_writes_bit_for_bit(case: Case, whole: bool) -> None:
    b = case.block_size
    if whole:
        # No block reaches over an edge: whole pieces of rows are copied.
        case.m, case.n = (max(size // b, 1) * b for size in (case.m, case.n))
        case.buffer = torch.cat([case.buffer] * (1 + 3 * case.m * case.n // len(case.buffer)))
        case.positions = case.positions[:, (case.positions < torch.tensor([[case.m // b], [case.n // b]])).all(0)]
    matrix = case.matrix(case.buffer.clone())
    copier = BlockCopier(matrix, case.positions, b)
    found = copier.read()
    assert found.dtype == matrix.dtype
    assert torch.equal(bits(found), bits(slow_read(matrix, case.positions, b)))
    blocks = found.flip(0)
    expected = case.buffer.clone()
    slow_write(case.matrix(expected), case.positions, b, blocks)
    version = matrix._version
    copier.write(blocks)
    assert torch.equal(bits(matrix), bits(case.matrix(expected)))
    assert matrix._version > version or not case.positions.shape[1]


class TestWriter:
    def test_what_reaches_over_the_edge_is_never_written(self) -> None:
        matrix = torch.zeros(10, 10)
        blocks = torch.full((1, 8, 8), torch.nan)
        blocks[0, :2, :2] = 1.0
        BlockWriter(matrix.shape, torch.tensor([[1], [1]]), 8).write(matrix, blocks)
        expected = torch.zeros(10, 10)
        expected[8:, 8:] = 1.0
        assert torch.equal(matrix, expected)

    def test_block_larger_than_the_matrix(self) -> None:
        matrix = torch.zeros(3, 5)
        blocks = torch.arange(64.0).view(1, 8, 8)
        BlockWriter(matrix.shape, torch.tensor([[0], [0]]), 8).write(matrix, blocks)
        assert torch.equal(matrix, blocks[0, :3, :5])
        assert torch.equal(read_blocks(matrix, torch.tensor([[0], [0]]), 8)[0, :3, :5], matrix)

    def test_positions_in_any_order_keep_their_blocks(self) -> None:
        # All four strips (inner, right, lower, corner) are hit, in an order that mixes them.
        positions = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 1]])
        matrix = torch.zeros(12, 13)
        blocks = torch.arange(4.0).add(1)[:, None, None].expand(4, 8, 8)
        BlockWriter(matrix.shape, positions, 8).write(matrix, blocks)
        assert [matrix[r * 8, c * 8].item() for r, c in positions.t().tolist()] == [1.0, 2.0, 3.0, 4.0]
        assert matrix.ne(0).all()

    def test_rounds_to_the_dtype_of_the_matrix(self) -> None:
        matrix = torch.zeros(8, 8, dtype=torch.bfloat16)
        blocks = torch.full((1, 8, 8), 1 / 3)
        BlockWriter(matrix.shape, torch.tensor([[0], [0]]), 8).write(matrix, blocks)
        assert torch.equal(matrix, torch.full((8, 8), 1 / 3).bfloat16())

    def test_writes_into_a_leaf_that_requires_grad_and_moves_its_version(self) -> None:
        weight = torch.nn.Parameter(torch.zeros(8, 8))
        version = weight._version
        BlockWriter(weight.shape, torch.tensor([[0], [0]]), 8).write(weight, torch.ones(1, 8, 8))
        assert weight.is_leaf
        assert weight.detach().eq(1).all()
        assert weight._version > version

    def test_rows_and_columns_are_read_where_they_are_kept(self) -> None:
        positions = torch.tensor([[1, 0], [1, 0]])
        for shape in ((16, 16), (10, 10)):
            writer = BlockWriter(shape, positions, 8)
            assert writer.positions is positions
            matrix = torch.zeros(shape)
            writer.write(matrix, torch.ones(2, 8, 8))
            assert matrix[:8, :8].all()
            assert matrix[8:, 8:].all()
            assert matrix.sum() == 64 + (shape[0] - 8) ** 2


class TestRead:
    def test_is_a_copy(self) -> None:
        matrix = torch.zeros(8, 8)
        read_blocks(matrix, torch.tensor([[0], [0]]), 8).fill_(1.0)
        assert not matrix.any()

    @pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9)])
    def test_beyond_the_grid_is_an_error(self, shape: tuple[int, int]) -> None:
        rows, cols = grid_shape(shape, 8)
        for position in ([[rows], [0]], [[0], [cols]]):
            with pytest.raises(IndexError):
                read_blocks(torch.zeros(shape), torch.tensor(position), 8)


def test_grid_covers_the_matrix_and_no_more() -> None:
    assert grid_shape((64, 64), 32) == (2, 2)
    assert grid_shape((65, 63), 32) == (3, 2)
    assert grid_shape((1, 1), 128) == (1, 1)


def test_blocks_are_float32_or_wider() -> None:
    assert [block_dtype(dtype) for dtype in DTYPES] == [torch.float32, torch.float64, torch.float32, torch.float32]
