"""Sentences in batches: splits share none, and every one is trained on once."""

from pathlib import Path

import pytest
import torch
from quality_inputs import batch
from torch import nn

from benchmarks.quality.tasks import Sizes
from benchmarks.quality.tasks.classification import COLA, SST2, load_model


class TestData:
    def test_splits_share_no_sentence_and_the_test_stays(self, data: Path) -> None:
        small = COLA.load(data, "tiny", Sizes(32, 16, 24, 16))
        large = COLA.load(data, "tiny", Sizes(64, 16, 24, 16))
        assert small.test == large.test
        texts = [{tuple(ids) for ids in part.ids} for part in (large.train, large.validation, large.test)]
        assert [len(part) for part in (large.train, large.validation, large.test)] == [64, 16, 168]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])

    def test_too_many_are_refused(self, data: Path) -> None:
        with pytest.raises(ValueError, match="144 training sentences"):
            SST2.load(data, "tiny", Sizes(140, 10, 0, 16))

    def test_batches_hold_every_sentence_once(self, data: Path) -> None:
        train_part = SST2.load(data, "tiny", Sizes(50, 1, 1, 16)).train
        for seed in (None, 3):
            batches = train_part.batches(8, seed=seed)
            rows = [
                ids[: int(mask.sum())].tolist()
                for each in batches
                for ids, mask in zip(each["input_ids"], each["attention_mask"], strict=True)
            ]
            assert sorted(rows) == sorted(train_part.ids)
        again = train_part.batches(8, seed=3)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))

    def test_dropout_is_off(self) -> None:
        model = load_model("minilm", 0).train()
        assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))
        inputs = batch()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
