"""Every method trains its parameters and nothing else, and about as many as the others."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from quality_inputs import BUDGET, CHANCE, SCOPE, batch, chance_scores
from torch import nn

from benchmarks.quality.adapters import Adapter
from benchmarks.quality.methods import METHODS, check_options
from benchmarks.quality.optimizers import MuonAndAdamW, for_dense
from benchmarks.quality.tasks.base import HEAD
from benchmarks.quality.tasks.classification import load_model
from benchmarks.quality.training import optimizer_of, train
from sylva_compile import BlockMask
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.optim import Muon

pytestmark = pytest.mark.filterwarnings(
    # torch warns because PEFT's SHiRA does not choose whether sparse tensors are checked.
    "ignore:Sparse invariant checks:UserWarning"
)


METHODS_TO_TRY: dict[str, Mapping[str, Any]] = {
    **{kind: {"kind": kind} for kind in METHODS if kind not in ("blocks", "badam", "lisa")},
    "badam": {"kind": "badam", "every": 2},
    "lisa": {"kind": "lisa", "every": 2, "layers": 1},
    "galore": {"kind": "full", "optimizer": "galore", "rank": 2, "refresh": 2},
    "blocks": CHANCE,
    "columns": {**CHANCE, "pattern": "columns"},
    "rectangle": {**CHANCE, "pattern": "rectangle"},
    "narrow": {**CHANCE, "column_budget": 0.5, "allocation": "global"},
    "pruned": {**CHANCE, "prune": True},
    **{f"{kind}, Muon": {"kind": kind, "optimizer": "muon"} for kind in ("full", "linear", "lora")},
    "blocks, Muon": {**CHANCE, "optimizer": "muon", "momentum": 0.8},
    "moving": {**CHANCE, "optimizer": "muon", "every": 2, "choose": "sketch"},
    "IST on LoRA": {"kind": "lora", "policy": "importance", "fraction": 0.5},
    "IST": {**CHANCE, "optimizer": "muon", "policy": "importance", "fraction": 0.5},
    "RST, moving": {**CHANCE, "every": 2, "policy": "random", "fraction": 0.5},
}


@pytest.fixture
def _no_process_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class TestMethods:
    @pytest.mark.usefixtures("_no_process_group_left")
    @pytest.mark.parametrize("name", METHODS_TO_TRY)
    def test_trains_what_it_may_and_nothing_else(self, name: str) -> None:
        model = load_model("tiny", 0)
        options = METHODS_TO_TRY[name]
        scores = chance_scores(model)
        kind = METHODS[options["kind"]]
        ready = kind.prepare(model, options, BUDGET, lambda options: scores, 0)
        before = {key: value.clone() for key, value in ready.model.state_dict().items()}
        trained = train(ready, [batch() for _ in range(4)], optimizer_of(ready, 1e-2, 1e-2))
        after = ready.model.state_dict()
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        heads = {key for key in changed if key.rsplit(".", 2)[-2] in HEAD}
        assert heads
        rest = changed - heads
        names = {id(parameter): key for key, parameter in ready.model.named_parameters()}
        if ready.masks is not None:
            assert rest == set(ready.masks)
            for key, mask in ready.masks.items():
                moved = after[key] != before[key]
                places = block_states(ready.model)[key].originals.places
                ever = BlockMask(mask.shape, mask.block_size, places)
                assert not bool((moved & ~ever.dense()).any())
                if "policy" not in options:  # blocks of layers that are not drawn do not move
                    assert ("every" in options) == (ever.nnz > mask.nnz)
                if options.get("prune"):
                    assert not bool(after[key][~mask.dense()].any())
        elif name == "head":
            assert not rest
        else:
            assert rest
            assert rest <= {names[id(parameter)] for parameter in ready.trained}
        assert trained.state_bytes > 0
        assert trained.saved_bytes > 0
        model_bytes = sum(value.numel() * value.element_size() for value in load_model("tiny", 0).parameters())
        assert trained.peak_bytes > model_bytes + trained.saved_bytes
        assert ready.checkpoint() > 0

    def test_muon_steps_matrices_alone(self) -> None:
        model = load_model("tiny", 0)
        ready = METHODS["full"].prepare(model, {"kind": "full", "optimizer": "muon"}, BUDGET, chance_scores, 0)
        optimizer = optimizer_of(ready, 0.25, 0.5)
        names = {parameter: name for name, parameter in model.named_parameters()}
        stepped: dict[bool, set[str]] = {True: set(), False: set()}
        for group in optimizer.param_groups:
            stepped[group["matrices"]] |= {names[parameter] for parameter in group["params"]}
            assert group["lr"] == (0.5 if any("classifier" in names[p] for p in group["params"]) else 0.25)
        assert stepped[True] | stepped[False] == set(names.values())
        assert stepped[True] == {
            name
            for name, p in model.named_parameters()
            if p.dim() == 2 and not re.search("embeddings|classifier", name)
        }

    @pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
    def test_float32_muon_is_torchs_but_for_rounding(self, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        start = torch.randn(shape)
        mine, torchs = (nn.Parameter(start.clone()) for _ in range(2))
        block = nn.Parameter(start.clone()[None])
        options: Any = {"optimizer": "muon", "precision": "float32", "momentum": 0.8}
        model = nn.Module()
        model.weight = mine
        optimizers = [
            for_dense(model, options)([{"params": [mine], "lr": 0.1}]),
            torch.optim.Muon([torchs], lr=0.1, weight_decay=0.0, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        ]
        if shape[0] == shape[1]:
            optimizers.append(Muon([block], lr=0.1, momentum=0.8))
        for _ in range(3):
            # Singular values over three decades, as gradients have them.
            gradient = torch.randn(shape) @ torch.diag(torch.logspace(0, -3, shape[1]))
            mine.grad, torchs.grad, block.grad = gradient.clone(), gradient.clone(), gradient[None].clone()
            for optimizer in optimizers:
                optimizer.step()
        # Of the change, torch's is off by the rounding of its bfloat16 products.
        assert (mine - torchs).norm() < 0.02 * (torchs - start).norm()
        if shape[0] == shape[1]:
            assert (mine - block[0]).norm() < 1e-3 * (mine - start).norm()

    def test_muon_follows_the_schedule_and_is_torchs(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)
        twin = nn.Linear(6, 4)
        twin.load_state_dict(layer.state_dict())
        made: Any = MuonAndAdamW([{"params": list(layer.parameters()), "lr": 0.1}], set())
        matrix = torch.optim.Muon([twin.weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        vector = torch.optim.AdamW([twin.bias], lr=0.1, weight_decay=0.0)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (made, matrix, vector)]
        for _ in range(3):
            for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
                mine.grad = other.grad = torch.randn_like(mine)
            for optimizer in (made, matrix, vector):
                optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        torch.testing.assert_close(dict(layer.named_parameters()), dict(twin.named_parameters()))
        assert len(made.state) == 2

    def test_budgets_are_as_equal_as_ranks_and_widths_allow(self) -> None:
        wanted = BUDGET.elements(load_model("tiny", 0))
        for name, options in METHODS_TO_TRY.items():
            kind = METHODS[options["kind"]]
            if not kind.has_budget:
                continue
            model = load_model("tiny", 0)
            per_rank = sum(sum(weight.shape) for weight in weights_in_scope(model, SCOPE).values())
            scores = chance_scores(model)
            ready = kind.prepare(model, options, BUDGET, lambda options, scores=scores: scores, 0)
            found = sum(parameter.numel() for parameter in ready.trained)
            # The tolerance is half a rank of LoRA, or one column of blocks of size 8 and 48 rows.
            assert abs(found - wanted) <= max(per_rank / 2, 8 * 48), name

    def test_an_adapter_is_where_its_layer_is(self) -> None:
        adapter = Adapter(nn.Linear(4, 4, device="meta"), 2)
        assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}

    def test_an_adapter_starts_as_no_change(self) -> None:
        model, inputs = load_model("tiny", 0).eval(), batch()
        expected = model(**inputs).logits
        METHODS["adapter"].prepare(model, {}, BUDGET, lambda options: chance_scores(model), 0)
        assert torch.equal(model(**inputs).logits, expected)

    def test_options_that_mean_nothing_are_refused(self) -> None:
        assert check_options({"kind": "lora", "prune": True}) is not None
        assert check_options({"kind": "lora", "sparsity": 1.0}) is not None
        assert check_options({**CHANCE, "choose": "sketch"}) is not None
        assert check_options({**CHANCE, "every": 4, "choose": "best"}) is not None
        assert check_options({"kind": "nothing"}) is not None
        assert check_options({"kind": "blocks"}) is not None
        assert check_options({**CHANCE, "policy": "random"}) is not None
        assert check_options({**CHANCE, "policy": "best", "fraction": 0.5}) is not None
        assert check_options({**CHANCE, "policy": "random", "fraction": 0.5}) is None
        assert check_options({"kind": "dora", "optimizer": "muon"}) is None
        assert check_options({**CHANCE, "pattern": "rows"}) is not None
        assert check_options({**CHANCE, "optimizer": "lion"}) is not None
        assert check_options({**CHANCE, "optimizer": "muon", "momentum": 1.0}) is not None
        assert check_options({"kind": "full", "optimizer": "muon", "momentum": 0.8}) is None
        assert check_options({"kind": "full", "optimizer": "muon", "precision": "float32"}) is None
        assert check_options({"kind": "full", "optimizer": "muon", "precision": "float16"}) is not None
        assert check_options({"kind": "full", "precision": "float32"}) is not None
        assert check_options({**CHANCE, "optimizer": "muon", "precision": "float32"}) is not None
        assert check_options({"kind": "lora", "optimizer": "galore", "rank": 4, "refresh": 10}) is not None
        assert check_options({"kind": "full", "optimizer": "galore", "rank": 4}) is not None
        assert check_options({"kind": "full", "rank": 4}) is not None
        assert check_options({"kind": "full", "optimizer": "galore", "rank": 4, "refresh": 10}) is None
        assert check_options({"kind": "badam"}) is not None
        assert check_options({"kind": "badam", "every": 10, "layers": 2}) is not None
        assert check_options({"kind": "lisa", "every": 10, "layers": 0}) is not None
        assert check_options({"kind": "lisa", "every": 10}) is None
        assert check_options(CHANCE) is None
