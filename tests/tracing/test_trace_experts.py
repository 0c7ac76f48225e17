"""Traces of mixtures of experts: every method against loops over experts, budgets, resumed traces and refusals."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from expert_twin import Twin, routed
from tiny_experts import EXPERTS, MIXTURES, VOCABULARY, Routed, experts_of, tiny_mixture
from torch import Tensor, nn
from trace_experts_two_ranks import METHODS as RANK_METHODS
from trace_experts_two_ranks import model_and_data, traced

import sylva_compile
from sylva_compile import Masks, SylvaConfig
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.errors import ArgumentError, ScopeError, TraceError
from sylva_compile.tracing.observation import observe
from sylva_compile.tracing.sharded import check_no_experts
from sylva_compile.tracing.trace import weight_specs

# transformers asks for torch's version inside of the compiled code.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")

B = 8
SCOPE = ["experts"]
STACKED = ("gate_up_proj", "down_proj")
METHODS: dict[str, dict[str, Any]] = {
    "gains": {"method": "kfac", "score": "gain"},
    "papers": {"method": "kfac", "score": "paper"},
    "squares": {"method": "fisher"},
}
Batch = dict[str, Tensor]


def sentences(count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCABULARY, (2, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "labels": each} for each in ids]


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss * len(batch["input_ids"])


def alone(architecture: str = "mixtral") -> Routed:
    """The experts of one layer, with the routing given by the batches."""
    (experts,) = experts_of(tiny_mixture(architecture)).values()
    return Routed(experts)


def to_experts(chosen: Tensor, x: Tensor | None = None, weigh: Tensor | None = None) -> tuple[Tensor, ...]:
    """A batch of `Routed`: inputs, the experts of each token `[T, k]`, their weights, and weights of the outputs."""
    x = torch.randn(len(chosen), 32) if x is None else x
    weigh = torch.randn(len(chosen), 32) if weigh is None else weigh
    return x, chosen, torch.ones(chosen.shape), weigh


def weighted(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, chosen, weights, weigh = batch
    return (model(x, chosen, weights.to(x.dtype)) * weigh).sum()


def alone_options(**options: Any) -> dict[str, Any]:
    return {"loss_fn": weighted, "scope": SCOPE, "block_size": B, "num_samples": 1, "progress": False} | options


class Each:
    """Passes the operands of one trace to the estimators of several methods."""

    def __init__(self, model: nn.Module) -> None:
        weights = weights_in_scope(model, SCOPE)
        specs = weight_specs(model, weights)
        self.held = {key: Estimators(specs, SylvaConfig(block_size=B, **one)) for key, one in METHODS.items()}
        observe(model, weights, self, sentences(), num_samples=4)

    def update(self, *given: Any) -> None:
        for one in self.held.values():
            one.update(*given)

    def end_batch(self) -> None:
        for one in self.held.values():
            one.end_batch()


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_of_a_loop_over_experts(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_mixture(architecture)
    # The wide twin routes the same tokens to the same experts if it has the same values.
    model = model.bfloat16().to(dtype)
    found = Each(model)
    names = [f"model.layers.0.{'feed_forward' if architecture == 'llama4' else 'mlp'}.experts.{one}" for one in STACKED]
    assert list(weights_in_scope(model, SCOPE)) == names
    wide = routed(model, names, sentences(), summed_loss)
    for name, (m, n) in zip(names, ((96, 32), (32, 48)), strict=True):
        twin = Twin(wide[name], m, n, B)
        assert sum(tokens > 0 for tokens in twin.tokens) > 1
        for key in METHODS:
            scores = found.held[key].scores(name)
            if architecture in ("gpt-oss", "llama4"):
                # Stored inputs by outputs.
                scores = scores.unflatten(0, (EXPERTS, -1)).transpose(1, 2).flatten(0, 1)
            wanted = getattr(twin, key)()
            assert wanted.any()
            if dtype == torch.bfloat16:
                # Rounding sends a token or two to other experts.
                near, exact = (each.flatten() / each.max() for each in (scores, wanted))
                assert torch.cosine_similarity(near, exact, dim=0) > 0.97, (name, key)
            else:
                limit = 1e-8 if dtype == torch.float64 else 1e-3
                assert (scores - wanted).abs().max() <= limit * wanted.max(), (name, key)


def test_layers_that_share_a_graph_have_scores_of_their_own() -> None:
    model = tiny_mixture("mixtral", layers=2).double()
    names = [f"model.layers.{at}.mlp.experts.down_proj" for at in range(2)]
    found = Each(model)
    wide = routed(model, names, sentences(), summed_loss)
    for name in names:
        wanted = Twin(wide[name], 32, 48, B).gains()
        assert (found.held["gains"].scores(name) - wanted).abs().max() <= 1e-8 * wanted.max()


class TestMethods:
    @pytest.mark.parametrize("budget", ["layer", "expert"])
    @pytest.mark.parametrize("method", ["sylva", "kfac", "fisher", "magnitude", "lift", "random"])
    def test_every_method_keeps_to_the_budget(self, method: Any, budget: Any) -> None:
        model = tiny_mixture("gpt-oss")
        options = {"sparsity": 0.9, "block_size": B, "scope": SCOPE, "progress": False, "num_samples": 2}
        masks = sylva_compile.trace_and_mask(model, sentences(1), method=method, expert_budget=budget, **options)
        for mask in masks.values():
            per_expert = mask.block_map().unflatten(0, (EXPERTS, -1)).flatten(1).sum(1)
            total = mask.block_map().numel()
            if budget == "layer":
                assert mask.nnz == SylvaConfig(sparsity=0.9).blocks(total)
            else:
                assert per_expert.tolist() == [SylvaConfig(sparsity=0.9).blocks(total // EXPERTS)] * EXPERTS
        assert masks.config["expert_budget"] == budget

    @pytest.mark.parametrize("score", ["greedy", "gain", "paper"])
    def test_the_model_is_left_as_it_was(self, score: Any) -> None:
        model = tiny_mixture("qwen3-moe")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        sylva_compile.trace_and_mask(model, sentences(), score=score, block_size=B, num_samples=4, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
        assert model.training

    def test_global_allocation_and_column_budget(self) -> None:
        model = tiny_mixture("mixtral")
        options = {"sparsity": 0.9, "block_size": B, "progress": False, "num_samples": 2}
        masks = sylva_compile.trace_and_mask(model, sentences(1), allocation="global", **options)
        total = sum(mask.block_map().numel() for mask in masks.values())
        assert sum(mask.nnz for mask in masks.values()) == SylvaConfig(sparsity=0.9).blocks(total)
        for budget in ("layer", "expert"):
            masks = sylva_compile.trace_and_mask(
                model, sentences(1), column_budget=0.5, expert_budget=budget, scope=SCOPE, **options
            )
            for mask in masks.values():
                assert mask.block_map().any(0).sum() <= mask.block_map().shape[1] // 2

    def test_padding_changes_nothing(self) -> None:
        model = tiny_mixture("mixtral").double()
        [batch] = sentences(1)
        kept = {name: value[:, :9] for name, value in batch.items()}
        padded = {"input_ids": batch["input_ids"], "labels": batch["labels"].clone()}
        padded["labels"][:, 9:] = -100
        options = {"score": "gain", "block_size": B, "sparsity": 0.8, "scope": SCOPE, "progress": False}
        first, second = (
            sylva_compile.trace_and_mask(model, [each], num_samples=2, **options) for each in (kept, padded)
        )
        assert dict(first) == dict(second)


class TestExpertsWithFewTokens:
    CHOSEN = torch.stack([torch.tensor([0, 1]) if t % 2 else torch.tensor([1, 2]) for t in range(40)])

    @pytest.mark.parametrize(
        ("architecture", "options"),
        [
            ("mixtral", {}),
            ("gpt-oss", {"score": "gain"}),
            ("mixtral", {"score": "paper"}),
            ("gpt-oss", {"method": "fisher"}),
        ],
    )
    def test_one_without_a_token_gets_no_block(self, architecture: str, options: dict[str, Any]) -> None:
        model = alone(architecture)
        masks = sylva_compile.trace_and_mask(model, [to_experts(self.CHOSEN)], **alone_options(sparsity=0.4, **options))
        for mask in masks.values():
            assert not mask.block_map().unflatten(0, (EXPERTS, -1))[EXPERTS - 1].any()
            assert mask.block_map().unflatten(0, (EXPERTS, -1))[:3].flatten(1).any(1).all()

    @pytest.mark.parametrize("options", [{}, {"score": "gain"}], ids=str)
    def test_one_without_a_token_gets_its_share_where_each_has_one(self, options: dict[str, Any]) -> None:
        masks = sylva_compile.trace_and_mask(
            alone(), [to_experts(self.CHOSEN)], **alone_options(sparsity=0.4, expert_budget="expert", **options)
        )
        for mask in masks.values():
            share = mask.block_map().unflatten(0, (EXPERTS, -1)).flatten(1).sum(1)
            assert share.unique().numel() == 1

    @pytest.mark.parametrize("options", [{}, {"score": "paper"}], ids=str)
    def test_one_with_a_single_token_does_not_win_by_noise(self, options: dict[str, Any]) -> None:
        chosen = torch.stack([torch.randperm(3)[:2] for _ in range(200)])
        chosen[0] = torch.tensor([3, 1])
        masks = sylva_compile.trace_and_mask(alone(), [to_experts(chosen)], **alone_options(sparsity=0.9, **options))
        for mask in masks.values():
            assert not mask.block_map().unflatten(0, (EXPERTS, -1))[3].any()

    @pytest.mark.parametrize(
        ("method", "score"),
        [("sylva", "greedy"), ("sylva", "gain"), ("sylva", "paper"), ("kfac", "greedy"), ("fisher", "gain")],
    )
    def test_a_block_with_a_planted_gradient_is_chosen(self, method: Any, score: Any) -> None:
        """The tokens of expert 2 agree on a gradient of outputs 8 to 15; all others have noise."""
        chosen = torch.randint(0, EXPERTS, (400, 1))
        weigh = 0.1 * torch.randn(400, 32)
        weigh[chosen[:, 0] == 2, 8:16] = 1.0
        model = alone()
        with torch.no_grad():
            # Activations of down_proj that agree as well: gate and up are large in its inputs 16 to 23.
            model.experts.gate_up_proj.mul_(0.1)
        x = torch.randn(400, 32)
        x[:, 0] = 4.0
        with torch.no_grad():
            model.experts.gate_up_proj[:, 16:24, 0] = 0.5
            model.experts.gate_up_proj[:, 64:72, 0] = 0.5
        masks = sylva_compile.trace_and_mask(
            model, [to_experts(chosen, x, weigh)], method=method, score=score, **alone_options(sparsity=0.99)
        )
        found = masks["experts.down_proj"].block_map().unflatten(0, (EXPERTS, -1))
        assert found[2, 1, 2]


def test_a_resumed_trace_ends_with_the_same_masks(tmp_path: Path) -> None:
    model, data = tiny_mixture("qwen3-moe"), sentences(5)
    options = {"block_size": B, "sparsity": 0.8, "num_samples": 10, "progress": False}
    whole = sylva_compile.trace_and_mask(model, data, **options)
    more = {"checkpoint": tmp_path / "trace.safetensors", "checkpoint_every": 2, **options}

    def broken_off() -> Iterator[Batch]:
        yield from data[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sylva_compile.trace_and_mask(model, broken_off(), **more)
    assert (tmp_path / "trace.safetensors").exists()
    assert dict(sylva_compile.trace_and_mask(model, data, **more)) == dict(whole)
    assert not (tmp_path / "trace.safetensors").exists()


def test_two_ranks_end_with_the_masks_of_all_their_data(tmp_path: Path) -> None:
    two_ranks.run("trace_experts_two_ranks.py", tmp_path)
    model, data = model_and_data()
    for at, options in enumerate(RANK_METHODS):
        first, second = (Masks.load(tmp_path / f"{at}-{rank}") for rank in (0, 1))
        assert dict(first) == dict(second) == dict(traced(model, data, options))


class TestEstimate:
    def test_counts_one_input_factor_and_an_output_factor_for_each_expert(self) -> None:
        model = tiny_mixture("gpt-oss")
        found = sylva_compile.estimate(model, method="kfac", score="gain", block_size=B, scope=SCOPE)
        for name, (m, n) in zip(found.weights, ((96, 32), (32, 48)), strict=True):
            memory = found.weights[name].memory
            assert memory.input_factor == 4 * n * n
            assert memory.output_factor == 4 * EXPERTS * m * m
            assert memory.gradient == 4 * EXPERTS * m * n
        fisher = sylva_compile.estimate(model, method="fisher", block_size=B, scope=SCOPE)
        assert [one.memory.input_factor for one in fisher.weights.values()] == [0, 0]

    @pytest.mark.parametrize("options", [{}, {"score": "gain"}, {"score": "paper"}, {"method": "fisher"}], ids=str)
    def test_equals_what_the_estimators_hold(self, options: dict[str, Any]) -> None:
        model = tiny_mixture("mixtral")
        weights = weights_in_scope(model, SCOPE)
        held = Estimators(weight_specs(model, weights), SylvaConfig(block_size=B, **options))
        observe(model, weights, held, sentences(1), num_samples=2)
        estimated = sylva_compile.estimate(model, block_size=B, scope=SCOPE, **options)
        taken = sum(tensor.nbytes for name, tensor in held.state().items())
        counted = [one.memory for one in estimated.weights.values()]
        total = sum(memory.gradient + memory.input_factor + memory.output_factor for memory in counted)
        # The numbers of tokens are not counted.
        assert 0 <= taken - total <= 2 * 8 * EXPERTS


class TestRefusals:
    def test_each_expert_a_share_where_there_is_no_expert(self) -> None:
        model = tiny_mixture("mixtral")
        for method in ("random", "sylva"):
            with pytest.raises(ArgumentError, match="no stacked experts are in scope"):
                sylva_compile.trace_and_mask(
                    model, sentences(), method=method, expert_budget="expert", block_size=B, scope=["q_proj"]
                )

    def test_each_expert_a_share_of_one_budget_for_all_weights(self) -> None:
        with pytest.raises(ArgumentError, match="leave one out"):
            SylvaConfig(expert_budget="expert", allocation="global")
        with pytest.raises(ArgumentError, match="use 'layer' or 'expert'"):
            SylvaConfig(expert_budget="layers")  # type: ignore[arg-type]

    def test_experts_beside_weights_that_fully_shard_splits(self) -> None:
        model = tiny_mixture("mixtral")
        with pytest.raises(ScopeError, match="leave the experts out of the scope"):
            check_no_experts(weight_specs(model, weights_in_scope(model, "all-linear")))
        check_no_experts(weight_specs(model, weights_in_scope(model, ["q_proj"])))

    def test_a_gradient_that_is_not_finite(self) -> None:
        x, *rest = to_experts(torch.randint(0, EXPERTS, (20, 1)))
        rest[-1][3] = torch.inf
        with pytest.raises(TraceError, match="not finite"):
            sylva_compile.trace_and_mask(alone(), [(x, *rest)], **alone_options())


class TestMoves:
    @pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
    @pytest.mark.parametrize("choose", ["gain", "greedy"])
    def test_blocks_move_by_a_new_trace(self, architecture: str, choose: Any) -> None:
        model = tiny_mixture(architecture).requires_grad_(False)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        options = {"block_size": B, "sparsity": 0.8, "scope": SCOPE}
        masks = sylva_compile.trace_and_mask(model, method="random", **options)
        masks.embed()
        optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
        config = SylvaConfig(num_samples=4, method="kfac", progress=False)
        schedule = sylva_compile.schedules.MovingBlocks(
            masks, every=1, choose=choose, temperature=0.0, loader=sentences(), config=config
        )
        model(**sentences()[0]).loss.backward()
        optimizer.step()
        twin = copy.deepcopy(model)
        sylva_compile.merge_and_unload(twin)
        schedule.step()
        wanted = sylva_compile.trace_and_mask(
            twin, sentences(), method="kfac", score=choose, num_samples=4, progress=False, **options
        )
        assert {name: mask.positions.tolist() for name, mask in masks.items()} == {
            name: mask.positions.tolist() for name, mask in wanted.items()
        }
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())

    def test_a_share_for_each_expert_is_refused(self) -> None:
        model = tiny_mixture("mixtral")
        masks = sylva_compile.trace_and_mask(model, method="random", block_size=B, scope=SCOPE)
        config = SylvaConfig(expert_budget="expert")
        with pytest.raises(ArgumentError, match="move between all experts"):
            sylva_compile.schedules.MovingBlocks(masks, choose="gain", loader=sentences(), config=config)
