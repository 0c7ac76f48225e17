"""Batches of any type: every tensor in them is moved, and everything else stays."""

from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding

from sylva_compile.tracing.batches import count_sequences, tensors_of, to_device


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


class TestToDevice:
    @pytest.mark.parametrize("make", [list, tuple, Pair._make, lambda pair: {"a": pair[0], "b": [pair[1]]}])
    def test_every_tensor_is_moved_and_the_kind_stays(self, make: Any) -> None:
        batch = make((torch.zeros(3, 2), torch.zeros(3)))
        moved = to_device(batch, torch.device("meta"))
        assert type(moved) is type(batch)
        assert [tensor.device.type for tensor in tensors_of(moved)] == ["meta", "meta"]

    @pytest.mark.parametrize("kind", [OrderedDict, BatchEncoding])
    def test_mappings_keep_their_kind_and_the_loader_keeps_its_batch(self, kind: Any) -> None:
        batch = kind({"ids": torch.zeros(3, 2), "text": "a"})
        moved = to_device(batch, torch.device("meta"))
        assert type(moved) is kind
        assert (moved["ids"].device.type, moved["text"]) == ("meta", "a")
        assert batch["ids"].device.type == "cpu"

    def test_a_mapping_that_nobody_can_change(self) -> None:
        moved = to_device(MappingProxyType({"ids": torch.zeros(3, 2)}), torch.device("meta"))
        assert moved["ids"].device.type == "meta"

    def test_what_knows_how_to_move_moves_itself(self) -> None:
        moved = to_device(pack_sequence([torch.zeros(3, 2)]), torch.device("meta"))
        assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")

    def test_other_values_stay(self) -> None:
        batch = {"text": ["a", "b"], "number": 3, "nothing": None}
        assert to_device(batch, torch.device("meta")) == batch


def test_sequences_are_counted_by_the_first_tensor_with_dimensions() -> None:
    assert count_sequences({"text": "a", "scale": torch.zeros(()), "ids": torch.zeros(5, 2)}) == 5
    assert count_sequences("a") == 1
