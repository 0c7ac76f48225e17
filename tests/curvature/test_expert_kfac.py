"""Estimators of stacked experts against dense loops over experts and tokens."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from expert_twin import Tokens, Twin
from hypothesis import given, settings
from torch import Tensor

from sylva_compile.config import SylvaConfig
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.expert_tokens import expert_tokens
from sylva_compile.curvature.weight_spec import WeightSpec

F64 = torch.float64
B = 8


def spec(experts: int, m: int, n: int, axis: int = 1) -> WeightSpec:
    shape = (experts * m, n) if axis == 1 else (experts * n, m)
    return WeightSpec("w", shape, F64, torch.device("cpu"), axis, experts=experts)


def draw(counts: list[int], m: int, n: int, seed: int, mean: float = 0.5) -> Tokens:
    """Tokens of experts that all share a direction, unless `mean` is 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        x = torch.randn(count, n, dtype=F64, generator=generator) + mean
        gy = torch.randn(count, m, dtype=F64, generator=generator) + mean * torch.rand(
            m, dtype=F64, generator=generator
        )
        found.append((x, gy))
    return found


def stacked(tokens: Tokens, beyond: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Join the tokens of all experts, and `beyond` rows that belong to none; return the operands and the offsets."""
    m, n = tokens[0][1].shape[1], tokens[0][0].shape[1]
    x = torch.cat([*(x for x, _ in tokens), torch.full((beyond, n), 3.0, dtype=F64)])
    gy = torch.cat([*(gy for _, gy in tokens), torch.full((beyond, m), 3.0, dtype=F64)])
    ends = torch.tensor([len(x) for x, _ in tokens]).cumsum(0).to(torch.int32)
    return x, gy, ends


def estimators(one: WeightSpec, batches: list[Tokens], **options: Any) -> Estimators:
    held = Estimators({"w": one}, SylvaConfig(block_size=B, **options))
    for batch in batches:
        held.update("w", *stacked(batch))
        held.end_batch()
    return held


counts = st.lists(st.integers(0, 12), min_size=2, max_size=4).filter(any)
sizes, seeds = st.integers(1, 18), st.integers(0, 10**6)


@pytest.mark.parametrize("method", ["kfac", "sylva"])
@given(counts=counts, m=sizes, n=sizes, seed=seeds, damping=st.sampled_from([None, 0.01, 1.0]))
@settings(deadline=None, max_examples=25)
def test_scores_of_a_loop_over_experts(
    method: Any, counts: list[int], m: int, n: int, seed: int, damping: float | None
) -> None:
    batches = [draw(counts, m, n, seed), draw(counts[::-1], m, n, seed + 1)]
    twin = Twin(batches, m, n, B)
    given_damping = {} if damping is None else {"damping": damping}
    whole = {"method": method, "damping": damping, "rank": 24, "num_partitions": 2}
    gains = estimators(spec(len(counts), m, n), batches, score="gain", **whole).scores("w")
    torch.testing.assert_close(gains, twin.gains(**given_damping), rtol=1e-6, atol=1e-9)
    papers = estimators(spec(len(counts), m, n), batches, score="paper", **whole).scores("w")
    wanted = twin.papers(**given_damping)
    torch.testing.assert_close(papers, wanted, rtol=1e-5, atol=1e-7 * float(wanted.max()))


@given(counts=counts, m=sizes, n=sizes, seed=seeds)
@settings(deadline=None, max_examples=25)
def test_squares_of_a_loop_over_experts(counts: list[int], m: int, n: int, seed: int) -> None:
    batches = [draw(counts, m, n, seed), draw(counts[::-1], m, n, seed + 1)]
    found = estimators(spec(len(counts), m, n), batches, method="fisher").scores("w")
    torch.testing.assert_close(found, Twin(batches, m, n, B).squares(), rtol=1e-9, atol=0)


@given(counts=counts, m=sizes, n=sizes, share=st.floats(0, 1), seed=seeds)
@settings(deadline=None, max_examples=25)
def test_the_greedy_choice_of_the_quadratic_model_written_out(
    counts: list[int], m: int, n: int, share: float, seed: int
) -> None:
    batches = [draw(counts, m, n, seed)]
    held = estimators(spec(len(counts), m, n), batches, method="kfac")
    twin = Twin(batches, m, n, B)
    everything = torch.ones_like(twin.gains(), dtype=torch.bool)
    count = round(share * everything.numel())
    assert torch.equal(held.greedy_map("w", count, everything), twin.greedy(count))


@given(counts=counts, m=sizes, n=sizes, share=st.floats(0, 1), seed=seeds)
@settings(deadline=None, max_examples=15)
def test_the_greedy_choice_of_each_expert(counts: list[int], m: int, n: int, share: float, seed: int) -> None:
    batches = [draw(counts, m, n, seed)]
    held = estimators(spec(len(counts), m, n), batches, method="kfac", expert_budget="expert")
    twin = Twin(batches, m, n, B)
    everything = torch.ones_like(twin.gains(), dtype=torch.bool)
    each = round(share * everything.numel() / len(counts))
    wanted = sum(twin.greedy(each, [e]).int() for e in range(len(counts)))
    assert torch.equal(held.greedy_map("w", each * len(counts), everything).int(), wanted)


def test_the_greedy_choice_keeps_to_the_allowed_blocks() -> None:
    batches = [draw([5, 0, 9], 16, 24, 0)]
    held = estimators(spec(3, 16, 24), batches)
    allowed = torch.ones(6, 3, dtype=torch.bool)
    allowed[:, 1] = False
    for count in (3, 9, 12):
        found = held.greedy_map("w", count, allowed)
        assert int(found.sum()) == count and not found[:, 1].any()


@pytest.mark.parametrize("score", ["gain", "paper", "greedy"])
def test_experts_stored_transposed_score_the_same(score: Any) -> None:
    batches = [draw([5, 0, 9], 16, 24, 0)]
    upright, turned = (estimators(spec(3, 16, 24, axis), batches, score=score) for axis in (1, 0))
    scores, other = upright.scores("w"), turned.scores("w")
    assert (scores.shape, other.shape) == ((6, 3), (9, 2))
    assert torch.equal(other.view(3, 3, 2).transpose(1, 2), scores.view(3, 2, 3))
    if score == "greedy":
        maps = (
            each.greedy_map("w", 7, torch.ones_like(each.scores("w"), dtype=torch.bool)) for each in (upright, turned)
        )
        first, second = maps
        assert torch.equal(second.view(3, 3, 2).transpose(1, 2), first.view(3, 2, 3))


@pytest.mark.parametrize("options", [{"score": "gain"}, {"score": "paper"}, {"method": "fisher"}], ids=str)
def test_a_single_expert_is_a_weight_like_others(options: dict[str, Any]) -> None:
    [(x, gy)] = draw([14], 16, 24, 0)
    one = estimators(WeightSpec.of("w", torch.empty(1, 16, 24, dtype=F64)), [[(x, gy)]], **options)
    plain = Estimators({"w": spec(1, 16, 24)}, SylvaConfig(block_size=B, **options))
    plain.update("w", x, gy)
    assert torch.equal(one.scores("w"), plain.scores("w"))


def test_rows_of_no_expert_and_padding_do_not_count() -> None:
    tokens = draw([5, 0, 9], 16, 24, 0)
    wanted = estimators(spec(3, 16, 24), [tokens], score="gain").scores("w")
    padded = [(torch.cat([x, x[:2]]), torch.cat([gy, torch.zeros_like(gy[:2])])) for x, gy in tokens]
    held = Estimators({"w": spec(3, 16, 24)}, SylvaConfig(block_size=B, score="gain"))
    held.update("w", *stacked(padded, beyond=4))
    torch.testing.assert_close(held.scores("w"), wanted)


def test_tokens_that_reach_an_expert_as_zeros_do_not_count() -> None:
    """Llama 4 multiplies the inputs of the tokens that were routed elsewhere by zero."""
    x, gy, ends = stacked(draw([5, 4], 16, 24, 0))
    x[2] = x[7] = 0
    found = expert_tokens(x, gy, ends)
    assert found.counts.tolist() == [4, 3]
    assert [expert for expert, *_ in found.each()] == [0, 1]
    assert found.live.logical_not().nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("options", [{"score": "gain"}, {"score": "paper"}, {"method": "fisher"}, {}], ids=str)
def test_without_any_token_all_scores_are_zero(options: dict[str, Any]) -> None:
    held = estimators(spec(3, 16, 24), [draw([0, 0, 0], 16, 24, 0)], **options)
    assert torch.equal(held.scores("w"), torch.zeros(6, 3, dtype=F64))
    if not options:
        found = held.greedy_map("w", 4, torch.ones(6, 3, dtype=torch.bool))
        assert found.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{"score": "gain"}, {"score": "paper"}, {"method": "fisher"}, {}], ids=str)
@pytest.mark.parametrize("few", [1, B, 4 * B])
def test_an_expert_with_few_tokens_does_not_win_by_noise(options: dict[str, Any], few: int) -> None:
    wins = 0.0
    for seed in range(5):
        held = estimators(spec(4, 32, 32), [draw([few, 300, 300, 300], 32, 32, seed, mean=0.0)], **options)
        count = 12
        if options:
            best = held.scores("w").flatten().topk(count).indices
            wins += float((best < 16).sum()) / count
        else:
            wins += float(held.greedy_map("w", count, torch.ones(16, 4, dtype=torch.bool))[:4].sum()) / count
    assert wins / 5 < 0.1


def test_few_tokens_may_win_by_a_gradient_that_they_agree_on() -> None:
    tokens = draw([40, 400, 400], 16, 16, 0, mean=0.0)
    x, gy = tokens[0]
    tokens[0] = x + 1, gy + 2
    scores = estimators(spec(3, 16, 16), [tokens], score="gain").scores("w")
    assert scores[:2].min() > scores[2:].max()


@pytest.mark.parametrize("options", [{"score": "gain"}, {"score": "paper"}, {"method": "fisher"}, {}], ids=str)
def test_state_goes_there_and_back(options: dict[str, Any]) -> None:
    batches = [draw([5, 0, 9], 16, 24, seed) for seed in range(3)]
    half, whole = (estimators(spec(3, 16, 24), part, **options) for part in (batches[:2], batches))
    resumed = estimators(spec(3, 16, 24), [], **options)
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    resumed.load_state(state.__getitem__, half.sharers())
    resumed.update("w", *stacked(batches[2]))
    resumed.end_batch()
    assert torch.equal(resumed.scores("w"), whole.scores("w"))
