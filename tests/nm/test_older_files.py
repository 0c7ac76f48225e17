"""Files of versions that kept the places of values as numbers: int16 or int32 columns, and rows with slots."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from nm_operands import columns_twin
from prune_two_ranks import Net
from torch import Tensor

import sylva_compile
from sylva_compile import NMMasks
from sylva_compile.errors import MaskError
from sylva_compile.nm.mask import NMMask
from sylva_compile.nm.mask_file import MaskFile
from sylva_compile.schedules import MaskChange

OLD = MaskFile("sylva-nm-masks-1", "N:M masks", "NMMasks.save")


def pruned(n: int = 2, m: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Net, NMMasks]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    masks = sylva_compile.prune_masks(model, n, m)
    masks.embed()
    return model, masks


def columns_of(mask: NMMask) -> Tensor:
    """The columns of a mask, as an old file has them."""
    per_row = mask.matrix_shape[1] // mask.m * mask.n
    return torch.tensor(columns_twin(mask.codes, per_row, mask.n, mask.m), dtype=torch.int16)


def write_old(path: Path, masks: NMMasks, columns: dict[str, Tensor]) -> None:
    shapes = {name: [*mask.shape, mask.n, mask.m, mask.input_axis] for name, mask in masks.items()}
    OLD.write(path, columns, {"shapes": shapes, "notes": {"double": masks.double, "config": masks.config}})


def old_state(masks: NMMasks) -> dict[str, dict[str, Tensor]]:
    """`masks.state_dict()` as it was: rows as int16, and the slot of each, 255 where the first mask keeps nothing."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, state in masks.state_dict().items():
        mask, (out, size) = masks[name], masks[name].matrix_shape
        rows = columns_twin(state["second"], out // mask.m * mask.n, mask.n, mask.m)
        slot = {
            (row, column): k % mask.n
            for row, some in enumerate(columns_of(mask).tolist())
            for k, column in enumerate(some)
        }
        slots = [[slot.get((row, column), 255) for row in some] for column, some in enumerate(rows)]
        rest = {key: value for key, value in state.items() if key != "second"}
        found[name] = {
            "rows": torch.tensor(rows, dtype=torch.int16).reshape(size, -1),
            "slots": torch.tensor(slots, dtype=torch.uint8),
            **rest,
        }
    return found


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 8), (1, 4)])
@pytest.mark.parametrize("wide", [False, True])
def test_an_old_file_of_masks_is_read(tmp_path: Path, n: int, m: int, wide: bool) -> None:
    _, masks = pruned(n, m)
    columns = {name: columns_of(mask) for name, mask in masks.items()}
    write_old(tmp_path / "old", masks, {name: each.int() if wide else each for name, each in columns.items()})
    loaded = NMMasks.load(tmp_path / "old")
    assert loaded.config == masks.config and loaded.double
    for name, mask in masks.items():
        assert mask.same_as(loaded[name]) and torch.equal(loaded[name].columns, columns[name])
    loaded.save(tmp_path / "new")
    again = NMMasks.load(tmp_path / "new")
    assert all(mask.same_as(again[name]) for name, mask in masks.items())
    assert (tmp_path / "new").stat().st_size < (tmp_path / "old").stat().st_size


def outside(columns: Tensor) -> Tensor:
    columns[1, 3] = 4
    return columns


@pytest.mark.parametrize(
    "damage", [outside, lambda columns: columns.flip(1), lambda columns: columns[:, 1:], lambda columns: columns - 1]
)
def test_a_damaged_old_file_is_refused(tmp_path: Path, damage: Any) -> None:
    _, masks = pruned()
    columns = {name: columns_of(mask) for name, mask in masks.items()}
    columns["two.weight"] = damage(columns["two.weight"]).contiguous()
    write_old(tmp_path / "old", masks, columns)
    with pytest.raises(MaskError):
        NMMasks.load(tmp_path / "old")


def train(model: Net, masks: NMMasks) -> MaskChange:
    schedule = MaskChange(masks, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(torch.ones(3, 16, dtype=masks.modules()["one.weight"]._nm_layout.dtype)).float().square().sum().backward()
        optimizer.step()
        schedule.step()
    return schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8)])
def test_an_old_state_of_a_training_is_read(dtype: torch.dtype, n: int, m: int) -> None:
    model, masks = pruned(n, m, dtype)
    schedule = train(model, masks)
    # One that the values do not give: it was chosen some steps ago.
    with torch.no_grad():
        for values in masks.parameters():
            values.copy_(values.flip(0))
    state = {**schedule.state_dict(), "masks": old_state(masks)}
    again, theirs = pruned(n, m, dtype)
    again.load_state_dict(model.state_dict())
    wanted = masks.state_dict()
    assert any(not torch.equal(one["second"], wanted[name]["second"]) for name, one in theirs.state_dict().items())
    MaskChange(theirs, every=1).load_state_dict(state)
    for name, one in theirs.state_dict().items():
        assert one.keys() == wanted[name].keys()
        assert all(torch.equal(value, wanted[name][key]) for key, value in one.items())


def test_second_masks_of_another_pattern_are_refused_before_anything_changes() -> None:
    """2:4 and 1:2 have codes of the same shape, and 2:8 and 4:8 rows of another one."""
    model, masks = pruned(2, 4)
    before = masks.state_dict()
    other, others = pruned(1, 2)
    mixed = {**before, "two.weight": others.state_dict()["two.weight"]}
    with pytest.raises(MaskError, match=r"two\.weight: .* do not keep 2 of every 4 places .* Give the state"):
        masks.load_state_dict(mixed)
    _other, others = pruned(2, 8)
    mixed = {**before, "two.weight": old_state(others)["two.weight"]}
    with pytest.raises(MaskError, match=r"two\.weight: .* Give the state"):
        masks.load_state_dict(mixed)
    for name, one in masks.state_dict().items():
        assert torch.equal(one["second"], before[name]["second"])
    assert model is masks.model and other is not None


def test_a_model_of_another_pattern_has_other_masks() -> None:
    """The codes of a 1:2 mask may be those of a 2:4 mask, which keeps other columns."""
    codes = torch.full((8, 1), 0b01000100, dtype=torch.uint8)
    one, two = (NMMask((8, 8), 1, 2, 1, codes), NMMask((8, 8), 2, 4, 1, codes))
    assert torch.equal(one.codes, two.codes) and not torch.equal(one.columns, two.columns)
    assert not one.same_as(two)


def test_pickles_of_columns_are_refused() -> None:
    model, masks = pruned()
    sylva_compile.add_low_rank(model, 2)
    layout, low_rank = model.one._nm_layout, model.one._nm_low_rank
    for each in (masks["one.weight"], layout, low_rank):
        old = type(each).__new__(type(each))
        old.__dict__.update({"columns" if key == "codes" else key: value for key, value in each.__dict__.items()})
        with pytest.raises(MaskError, match=r"save state_dict\(\) and NMMasks\.save\(\) with that version"):
            pickle.loads(pickle.dumps(old))
