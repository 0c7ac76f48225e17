"""Tests of masks: their content, their binding to a model, and files that are damaged or interrupted."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import random_masks
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import sylva_compile
from sylva_compile import BlockMask, Masks, SylvaError
from sylva_compile.errors import ArgumentError, MaskError, ScopeError


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))


class TestBlockMask:
    def test_blocks_are_sorted_by_row_then_column(self) -> None:
        mask = BlockMask.from_block_map(torch.tensor([[0, 1, 1], [1, 0, 1]]).bool(), (16, 20), 8)
        assert mask.rows.tolist() == [0, 0, 1, 1]
        assert mask.cols.tolist() == [1, 2, 0, 2]
        assert mask.nnz == 4

    def test_dense_covers_whole_blocks_and_the_remainder(self) -> None:
        mask = BlockMask.from_block_map(torch.tensor([[0, 1], [1, 0]]).bool(), (9, 12), 8)
        dense = mask.dense()
        assert dense.shape == (9, 12)
        assert dense[:8, 8:].all()
        assert dense[8, :8].all()
        assert int(dense.sum()) == mask.trainable == 8 * 4 + 8

    @pytest.mark.parametrize(("rows", "cols"), [([0, 0], [1, 1]), ([1, 0], [0, 0]), ([0], [3]), ([-1], [0])])
    def test_blocks_twice_out_of_order_or_outside_are_refused(self, rows: list[int], cols: list[int]) -> None:
        with pytest.raises(MaskError, match="each once"):
            BlockMask((16, 24), 8, torch.tensor([rows, cols]))

    @pytest.mark.parametrize("positions", [torch.zeros(2, 1).int(), torch.zeros(3, 1).long(), torch.arange(2)])
    def test_positions_of_another_kind_are_refused(self, positions: torch.Tensor) -> None:
        with pytest.raises(MaskError, match="must be int64"):
            BlockMask((16, 24), 8, positions)

    def test_positions_of_any_layout_are_kept_as_they_are_now(self, tmp_path: Path) -> None:
        positions = torch.tensor([[0, 1], [1, 0]])
        mask = BlockMask((16, 24), 8, positions.t().contiguous().t())
        Masks({"w": mask}).save(tmp_path / "masks")
        assert Masks.load(tmp_path / "masks")["w"] == mask
        mine = positions.clone()
        kept = BlockMask((16, 24), 8, mine)
        mine.zero_()
        assert torch.equal(kept.positions, positions)

    def test_a_map_of_another_grid_is_refused(self) -> None:
        with pytest.raises(MaskError, match=r"make it \(2, 2\)"):
            BlockMask.from_block_map(torch.ones(1, 2).bool(), (9, 12), 8)


class TestMasks:
    def test_is_a_mapping_in_the_models_order(self) -> None:
        masks = random_masks(small(), ["0.weight", "2.weight"], 16, 0.5)
        assert list(masks) == ["0.weight", "2.weight"]
        assert masks["2.weight"].shape == (30, 50)
        assert "2 weights" in masks.summary()

    def test_a_pickle_is_bound_to_no_model(self) -> None:
        model = small()
        masks = random_masks(model, ["0.weight"], 16, 0.5)
        twin = pickle.loads(pickle.dumps(masks))
        assert (dict(twin), twin.config, twin.model) == (dict(masks), masks.config, None)

    def test_a_copy_belongs_to_the_copy_of_the_model_or_to_none(self) -> None:
        model = small()
        masks = random_masks(model, ["0.weight"], 16, 0.5)
        masks.embed()
        assert copy.deepcopy(masks).model is None
        other, bound = copy.deepcopy((model, masks))
        assert bound.model is other
        assert bound.parameters()[0] is other.get_parameter("0.weight_blocks")

    def test_parameters_embed_on_demand(self) -> None:
        model = small()
        masks = random_masks(model, ["0.weight"], 16, 0.5)
        (blocks,) = masks.parameters()
        assert blocks is model.get_parameter("0.weight_blocks")

    def test_a_model_that_is_gone_is_said_so(self) -> None:
        masks = random_masks(small(), ["0.weight"], 16, 0.5)
        with pytest.raises(MaskError, match="not bound"):
            masks.parameters()

    def test_summary_counts_what_else_trains(self) -> None:
        model = small()
        masks = random_masks(model, ["0.weight"], 16, 0.5)
        masks.embed()
        assert "1,580 elements outside the masks require grad" in masks.summary()
        model.requires_grad_(False)
        model.get_parameter("0.weight_blocks").requires_grad_(True)
        assert "outside the masks" not in masks.summary()

    @pytest.mark.parametrize("block_size", [0, 7, True, 8.0])
    def test_block_sizes_below_eight_are_refused(self, block_size: int) -> None:
        with pytest.raises(ArgumentError, match="8 or more"):
            Masks.from_block_maps(small(), {"0.weight": torch.ones(1, 1).bool()}, block_size)

    def test_a_block_larger_than_everything_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match="at most 50"):
            Masks.from_block_maps(small(), {"0.weight": torch.ones(1, 1).bool()}, 64)


class TestOtherModels:
    def test_a_missing_name(self) -> None:
        masks = random_masks(small(), ["2.weight"], 16, 0.5)
        model = nn.Sequential(nn.Linear(40, 50))
        with pytest.raises(MaskError, match=r"'2.weight', which this model lacks"):
            masks.embed(model)
        assert type(model[0]) is nn.Linear

    def test_another_shape(self) -> None:
        masks = random_masks(small(), ["0.weight"], 16, 0.5)
        model = nn.Sequential(nn.Linear(40, 51))
        with pytest.raises(MaskError, match=r"\(51, 40\) here and \(50, 40\)"):
            masks.embed(model)
        assert type(model[0]) is nn.Linear
        assert model[0].weight.requires_grad

    def test_an_unknown_name_in_from_block_maps(self) -> None:
        with pytest.raises(MaskError, match="named_parameters"):
            Masks.from_block_maps(small(), {"0.wait": torch.ones(1, 1).bool()}, 16)

    @pytest.mark.parametrize("odd", ["meta", "integer", "vector", "wrapper"])
    def test_weights_that_cannot_carry_blocks(self, odd: str) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        name, block_map = "0.weight", torch.ones(2, 2).bool()
        if odd == "meta":
            model.to("meta")
        elif odd == "integer":
            model[0].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
        elif odd == "wrapper":
            # As torchao's quantised weights.
            model[0].weight = nn.Parameter(TwoTensor(torch.zeros(16, 16), torch.zeros(16, 16)))
        else:
            name = "0.bias"
        with pytest.raises(ScopeError):
            Masks.from_block_maps(model, {name: block_map}, 8)


class TestFiles:
    def test_a_place_where_nothing_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(MaskError, match=r"No masks can be written to .*; name a file"):
            random_masks(small(), ["0.weight"], 8, 0.5).save(tmp_path / "file" / "masks")

    def test_round_trip(self, tmp_path: Path) -> None:
        model = small()
        masks = random_masks(model, ["0.weight", "2.weight"], 16, 0.5)
        masks.config["note"] = "ä"
        masks.save(tmp_path / "deep" / "masks.safetensors")
        loaded = Masks.load(tmp_path / "deep" / "masks.safetensors")
        assert dict(loaded) == dict(masks)
        assert loaded.config == masks.config
        assert loaded.model is None
        loaded.embed(model)

    def test_saving_over_a_file_leaves_nothing_beside_it(self, tmp_path: Path) -> None:
        masks = random_masks(small(), ["0.weight"], 16, 0.5)
        masks.save(tmp_path / "masks")
        masks.save(tmp_path / "masks")
        assert [path.name for path in tmp_path.iterdir()] == ["masks"]

    @pytest.mark.parametrize("content", [b"", b"not a mask file", b"\x10\x00\x00\x00\x00\x00\x00\x00{}              "])
    def test_other_files_are_refused_in_one_line(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "masks"
        path.write_bytes(content)
        with pytest.raises(MaskError) as caught:
            Masks.load(path)
        assert "\n" not in str(caught.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(SylvaError, match="does not exist"):
            Masks.load(tmp_path / "nothing")

    def test_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(MaskError, match="cannot be read") as caught:
            Masks.load(tmp_path)
        assert "\n" not in str(caught.value)

    def test_numbers_of_numpy_in_the_configuration(self, tmp_path: Path) -> None:
        masks = Masks({}, config={"sparsity": np.float32(0.5)})
        masks.save(tmp_path / "masks")
        assert Masks.load(tmp_path / "masks").config == {"sparsity": 0.5}

    def test_a_file_that_calls_the_greedy_choice_joint(self, tmp_path: Path) -> None:
        masks = random_masks(small(), ["0.weight"], 8, 0.5)
        masks.config = {"method": "sylva", "score": "joint", "rank": 8}
        masks.save(tmp_path / "old")
        assert Masks.load(tmp_path / "old").config == {"method": "sylva", "score": "greedy", "rank": 8}


class TestBase:
    """Masks remember the weights that they were chosen for."""

    def masks(self, tmp_path: Path) -> Masks:
        torch.manual_seed(0)
        made = sylva_compile.trace_and_mask(
            nn.Sequential(nn.Linear(32, 32)), method="random", block_size=8, sparsity=0.9
        )
        made.save(tmp_path / "masks.safetensors")
        return Masks.load(tmp_path / "masks.safetensors")

    def test_other_weights_are_said_and_embedded(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.masks(tmp_path).embed(nn.Sequential(nn.Linear(32, 32)))
        assert "other weights" in caplog.text

    def test_the_same_weights_are_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        masks = self.masks(tmp_path)
        torch.manual_seed(0)
        masks.embed(nn.Sequential(nn.Linear(32, 32)))
        assert not caplog.records

    def test_versions_are_kept(self, tmp_path: Path) -> None:
        versions = self.masks(tmp_path).config["versions"]
        assert versions == {"torch": torch.__version__, "sylva-compile": sylva_compile.__version__}
