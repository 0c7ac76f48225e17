import copy

import torch

from sylva_compile import BlockMask
from sylva_compile.blocks.layout import BlockLayout, share_input_channels, update_input_channels
from sylva_compile.kernels.sddmm.op import sddmm_reference

CPU = torch.device("cpu")


def layout(grid: list[list[int]], shape: tuple[int, int], b: int = 8, axis: int = 1) -> BlockLayout:
    return BlockLayout(BlockMask.from_block_map(torch.tensor(grid), shape, b), axis, CPU)


def check(one: BlockLayout, shape: tuple[int, int]) -> None:
    """Assert that SDDMM of the input channels at the narrow positions equals SDDMM of the whole input."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(5, size, generator=generator) for size in shape]
    whole = sddmm_reference(*operands, one.positions, one.block_size)
    operands[one.input_axis] = operands[one.input_axis][:, one.input_channels]
    narrow = sddmm_reference(*operands, one.narrow_positions, one.block_size)
    torch.testing.assert_close(narrow, whole)


def test_alone_a_weight_has_the_lines_that_its_blocks_cover() -> None:
    one = layout([[0, 0, 1], [1, 0, 0]], (16, 20))
    assert one.input_channels.tolist() == [*range(8), *range(16, 20)]
    check(one, (16, 20))


def test_sharing_gives_one_tensor_of_the_lines_of_all() -> None:
    first, second = layout([[0, 0, 1], [0, 0, 0]], (16, 20)), layout([[1, 0, 0]], (5, 20))
    assert share_input_channels([first, second])
    assert first.input_channels is second.input_channels
    assert first.input_channels.tolist() == [*range(8), *range(16, 20)]
    check(first, (16, 20))
    check(second, (5, 20))


def test_sharing_again_changes_nothing() -> None:
    first, second = layout([[0, 0, 1]], (8, 20)), layout([[1, 0, 0]], (8, 20))
    share_input_channels([first, second])
    before = first.input_channels
    assert not share_input_channels([first, second])
    assert first.input_channels is before


def test_a_stored_weight_that_lies_the_other_way_shares_too() -> None:
    first, second = layout([[0, 0, 1]], (8, 20)), layout([[1], [0], [0]], (20, 8), axis=0)
    assert share_input_channels([first, second])
    assert first.input_channels is second.input_channels
    check(first, (8, 20))
    check(second, (20, 8))


def test_weights_with_unlike_inputs_or_blocks_do_not_share() -> None:
    first = layout([[0, 0, 1]], (8, 20))
    for other in (layout([[1, 0, 0]], (8, 24)), layout([[1, 0]], (16, 20), b=16)):
        own = other.input_channels
        share_input_channels([first, other])
        assert other.input_channels is own
        check(other, (8, 24) if other.block_size == 8 else (16, 20))


def test_sharing_with_an_empty_mask() -> None:
    first, second = layout([[0, 0, 1]], (8, 20)), layout([[0, 0, 0]], (8, 20))
    share_input_channels([first, second])
    check(first, (8, 20))
    check(second, (8, 20))


def test_a_copy_still_shares() -> None:
    pair = [layout([[0, 0, 1]], (8, 20)), layout([[1, 0, 0]], (8, 20))]
    share_input_channels(pair)
    first, second = copy.deepcopy(pair)
    assert first.input_channels is second.input_channels


def test_sizes_are_marked_once() -> None:
    one = layout([[0, 0, 1]], (8, 20))
    assert one.mark_sizes_dynamic()
    assert not one.mark_sizes_dynamic()


def test_room_for_other_adapters_keeps_the_number_of_channels() -> None:
    """Whichever of the masks is in place, and with weights that share: the last column of 36 has four channels."""
    grids = {"a": [[1, 0, 0, 0, 0]], "b": [[1, 1, 0, 0, 0]], "c": [[0, 0, 1, 0, 0]]}
    masks = {name: BlockMask.from_block_map(torch.tensor(grid), (8, 36), 8) for name, grid in grids.items()}
    other = layout([[0, 1, 0, 0, 0]], (8, 36))
    for shared in (False, True):
        counts = set()
        for name, mask in masks.items():
            one = BlockLayout(mask, 1, CPU)
            one.others = {key: value for key, value in masks.items() if key != name}
            other.others = dict.fromkeys(one.others, other._mask)
            if shared:
                share_input_channels([one, other])
            update_input_channels([one, other] if shared else [one])
            counts.add(len(one.input_channels))
            check(one, (8, 36))
        assert counts == {20}
