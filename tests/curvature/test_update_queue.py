"""Joint updates of several factors: the same sums as single updates, in bounded memory."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from combine_two_ranks import batch_of, estimators
from torch import Tensor, nn

import sylva_compile
from sylva_compile.curvature import estimators as estimators_module
from sylva_compile.curvature import online, update_queue
from sylva_compile.curvature.estimators import Estimators
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.curvature.online import OnlineHierarchy, update_together
from sylva_compile.curvature.update_queue import UpdateQueue

CPU, F64 = torch.device("cpu"), torch.float64
ROOM = 2**30

Group = tuple[list[OnlineHierarchy], list[Tensor]]


@pytest.fixture(autouse=True)
def _waiting_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", ROOM)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every joint update of an `Estimators` adds its number of factors."""
    found: list[int] = []

    def count(trees: Sequence[OnlineHierarchy], tokens: Sequence[Tensor]) -> None:
        found.append(len(trees))
        update_together(trees, tokens)

    monkeypatch.setattr(estimators_module, "update_together", count)
    return found


def tokens_of(count: int, size: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, size, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def two(size: int = 16) -> tuple[OnlineHierarchy, OnlineHierarchy, list[int]]:
    """Return two factors with one queue, and the list of the numbers of factors in its joint updates."""
    found: list[int] = []

    def update(trees: Sequence[OnlineHierarchy], tokens: Sequence[Tensor]) -> None:
        found.append(len(trees))
        update_together(trees, tokens)

    queue = UpdateQueue(update)
    first, second = (OnlineHierarchy(size, 1, size, dtype=F64, queue=queue) for _ in range(2))
    return first, second, found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


class TestQueue:
    def test_factors_with_equal_keys_are_updated_together_in_the_order_of_adding(self) -> None:
        seen: list[tuple[list[str], list[int]]] = []
        queue = UpdateQueue[str](lambda names, tokens: seen.append((list(names), [len(z) for z in tokens])))
        for at, name in enumerate("abcd"):
            assert queue.make_room(name, 8, CPU)
            queue.add(name, torch.zeros(at, 3), group=name in "ac", nbytes=8)
        assert seen == []
        queue.flush()
        queue.flush()
        assert seen == [(["a", "c"], [0, 2]), (["b", "d"], [1, 3])]

    def test_waiting_tokens_stay_below_the_memory_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", 20)
        seen: list[list[str]] = []
        queue = UpdateQueue[str](lambda names, tokens: seen.append(list(names)))
        for name in "abcde":
            assert queue.make_room(name, 10, CPU)
            queue.add(name, torch.zeros(1), group=0, nbytes=10)
        assert seen == [["a", "b"], ["c", "d"]]
        # An update too large for the queue is done at once, but after a waiting update of its own factor.
        assert not queue.make_room("large", 21, CPU)
        assert seen[2:] == []
        assert not queue.make_room(name, 21, CPU)
        assert seen[2:] == [["e"]]

    def test_a_factor_that_waits_is_updated_before_it_waits_again(self) -> None:
        seen: list[list[str]] = []
        queue = UpdateQueue[str](lambda names, tokens: seen.append(list(names)))
        for name in "aba":
            assert queue.make_room(name, 1, CPU)
            queue.add(name, torch.zeros(1), group=0, nbytes=1)
        assert seen == [["a", "b"]]

    def test_a_failure_empties_the_queue(self) -> None:
        def fail(names: Sequence[str], tokens: Sequence[Tensor]) -> None:
            raise ArithmeticError

        queue = UpdateQueue[str](fail)
        for name in "ab":
            queue.make_room(name, 1, CPU)
            queue.add(name, torch.zeros(1), group=name, nbytes=1)
        with pytest.raises(ArithmeticError):
            queue.flush()
        queue.flush()
        # The queue has dropped both factors and the memory that it counted for them.
        assert queue.make_room("a", ROOM, CPU)

    def test_by_default_only_updates_on_accelerators_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert update_queue.group_bytes(CPU) == 0
        assert update_queue.group_bytes(torch.device("cuda", 1)) == update_queue.GROUP_BYTES
        first, second, found = two()
        for tree in (first, second):
            tree.update(tokens_of(3, 16))
        assert found == []
        close(first.leaves[0], (tokens_of(3, 16).mT @ tokens_of(3, 16))[:8, :8])


class TestHierarchies:
    def test_the_queue_holds_a_copy(self) -> None:
        first, second, _ = two()
        tokens = tokens_of(5, 16)
        expected = tokens.mT @ tokens
        for tree in (first, second):
            tree.update(tokens)
        tokens.zero_()
        close(second.hierarchy().dense(), expected)

    READERS: tuple[tuple[str, Callable[[OnlineHierarchy, OnlineHierarchy], Tensor]], ...] = (
        ("state", lambda tree, other: tree.state()[0][0]),
        ("hierarchy", lambda tree, other: tree.hierarchy().leaves[0]),
        ("mean", lambda tree, other: tree.mean(torch.ones(())).leaves[0]),
        ("copy", lambda tree, other: tree.copy().leaves[0]),
        ("merge", lambda tree, other: (tree.merge(OnlineHierarchy(16, 1, 16, dtype=F64)), tree.leaves[0])[1]),
        ("merged", lambda tree, other: (other.merge(tree), other.leaves[0])[1]),
    )

    @pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
    def test_every_reader_finds_the_whole_sum(
        self, name: str, read: Callable[[OnlineHierarchy, OnlineHierarchy], Tensor]
    ) -> None:
        first, _, _ = two()
        tokens = tokens_of(5, 16)
        first.update(tokens)
        other = OnlineHierarchy(16, 1, 16, dtype=F64)
        close(read(first, other), (tokens.mT @ tokens)[:8, :8])

    def test_waiting_tokens_are_combined_over_ranks_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Stand-ins for the collectives of one rank.
        monkeypatch.setattr(online, "all_reduce", lambda total, group: None)
        monkeypatch.setattr(online, "_gathered", lambda total, group: [total])
        first, _, _ = two()
        tokens = tokens_of(5, 16)
        first.update(tokens)
        first.combine(None)  # type: ignore[arg-type]
        close(first.leaves[0], (tokens.mT @ tokens)[:8, :8])

    def test_a_copy_waits_in_the_same_queue(self) -> None:
        first, _, found = two()
        first.update(tokens_of(5, 16))
        twin = first.copy()
        for tree in (first, twin):
            tree.update(tokens_of(5, 16, 1))
        first.state()
        assert found == [1, 2]
        whole = torch.cat([tokens_of(5, 16), tokens_of(5, 16, 1)])
        for tree in (first, twin):
            close(tree.hierarchy().dense(), whole.mT @ whole)

    def test_repeated_updates_keep_their_order(self) -> None:
        """At low rank the order matters, and so does the number of the update, which draws the mixtures."""
        queue = UpdateQueue(update_together)
        waiting, alone = OnlineHierarchy(32, 1, 2, queue=queue), OnlineHierarchy(32, 1, 2)
        for seed in range(3):
            for tree in (waiting, alone):
                tree.update(tokens_of(20, 32, seed))
        for mine, other in zip(waiting.state(), alone.state(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)

    def test_other_shapes_tokens_dtypes_and_histories_are_not_grouped(self) -> None:
        found: list[int] = []

        def update(trees: Sequence[OnlineHierarchy], tokens: Sequence[Tensor]) -> None:
            found.append(len(trees))
            update_together(trees, tokens)

        queue = UpdateQueue(update)
        ahead = OnlineHierarchy(16, 1, 4, dtype=F64, queue=queue)
        ahead.update(tokens_of(3, 16))
        ahead.state()
        plain = OnlineHierarchy(16, 1, 4, dtype=F64, queue=queue)
        others = [
            OnlineHierarchy(16, 2, 4, dtype=F64, queue=queue),
            OnlineHierarchy(16, 1, 3, dtype=F64, queue=queue),
            OnlineHierarchy(16, 1, 4, dtype=F64, probes=5, queue=queue),
            OnlineHierarchy(16, 1, 4, dtype=torch.float32, queue=queue),
            OnlineHierarchy(17, 1, 4, dtype=F64, queue=queue),
        ]
        more = OnlineHierarchy(16, 1, 4, dtype=F64, queue=queue)
        for tree in (ahead, plain, *others):
            tree.update(tokens_of(3, tree.layout.size))
        more.update(tokens_of(4, 16))
        queue.flush()
        assert found == [1] * 9

    @pytest.mark.parametrize(
        ("size", "depth", "rank", "tokens"),
        [(768, 4, 8, 512), (768, 4, 8, 8), (1000, 3, 8, 100), (1024, 1, 8, 400), (1024, 2, 32, 100)],
    )
    def test_memory_is_counted_in_full(self, size: int, depth: int, rank: int, tokens: int) -> None:
        queue = UpdateQueue(update_together)
        trees = [OnlineHierarchy(size, depth, rank, queue=queue) for _ in range(5)]
        data = [tokens_of(tokens, size, at, torch.float32) for at in range(5)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for tree, one in zip(trees, data, strict=True):
                tree.update(one)
            counted = queue._held
            queue.flush()
        level = peak = 0
        for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                level += event.nbytes()
                peak = max(peak, level)
        print(f"peak {peak / 2**20:.1f} MiB, counted {counted / 2**20:.1f} MiB")
        assert 0.2 * counted < peak <= counted


def shown(one: Estimators, names: str, m: int, n: int, seed: int) -> None:
    """Show a batch in which all but the last of `names` read one tensor."""
    x, gy = batch_of(30, m, n, seed)
    for at, name in enumerate(names):
        one.update(name, x if name != names[-1] else x.clone(), gy * (1 + at))
    one.end_batch()


class TestEstimators:
    def test_layers_are_updated_together_and_shared_inputs_count_once(self, calls: list[int]) -> None:
        one = estimators("qkvo", 20, 24, "sylva", "paper", rank=4)
        for seed in range(2):
            shown(one, "qkvo", 20, 24, seed)
        # G of four weights; A of q, k, v and that of o. In the first batch inputs are held until its end.
        assert calls == [4, 2] * 2
        assert one.sharers() == [["q", "k", "v"], ["o"]]

    @pytest.mark.parametrize(("limit", "most"), [(70_000, 1), (130_000, 2), (ROOM, 4)])
    def test_sums_are_those_of_single_updates(
        self, limit: int, most: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        states = []
        for room in (limit, 0):
            monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", room)
            one = estimators("qkvo", 20, 24, "sylva", "paper", rank=2)
            for seed in range(3):
                shown(one, "qkvo", 20, 24, seed)
            states.append(one.state())
        assert max(calls) == most
        assert list(states[0]) == list(states[1])
        for name, tensor in states[0].items():
            close(tensor.abs(), states[1][name].abs())

    def test_experts_of_different_loads(self, calls: list[int]) -> None:
        one, exact = (estimators("abc", 20, 24, method, "paper", rank=20) for method in ("sylva", "kfac"))
        for name, count in zip("abc", (30, 7, 30), strict=True):
            for each in (one, exact):
                each.update(name, *batch_of(count, 20, 24, ord(name)))
        one.end_batch()
        assert sorted(calls) == [1, 1, 2, 2]
        exact.end_batch()
        for name in "abc":
            found, expected = one.take_scores(name), exact.take_scores(name)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.max()))

    def test_a_reader_that_ends_sharing_within_a_batch_keeps_the_waiting_tokens(self) -> None:
        """q shows x again, without k: its copy of their factor must hold the x that still waits."""
        one, exact = (estimators("qk", 20, 24, method, "paper", rank=20) for method in ("sylva", "kfac"))
        x, gy = batch_of(30, 20, 24, 0)
        for each in (one, exact):
            for names in ("qk", "qkq"):
                for name in names:
                    each.update(name, x, gy)
                each.end_batch()
        for name in "qk":
            found, expected = one.take_scores(name), exact.take_scores(name)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.max()))

    @pytest.mark.parametrize("limit", [130_000, ROOM])
    def test_loading_a_state_continues_the_sums(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", limit)
        whole, first, second = (estimators("qkvo", 20, 24, "sylva", "paper", rank=2) for _ in range(3))
        for seed in range(4):
            shown(whole, "qkvo", 20, 24, seed)
        for seed in range(2):
            shown(first, "qkvo", 20, 24, seed)
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        second.load_state(state.__getitem__, first.sharers())
        for seed in range(2, 4):
            shown(second, "qkvo", 20, 24, seed)
        for name, tensor in whole.state().items():
            assert torch.equal(second.state()[name], tensor)

    def test_nothing_waits_between_batches(self, calls: list[int]) -> None:
        one = estimators("qk", 20, 24, "sylva", "paper")
        shown(one, "qk", 20, 24, 0)
        assert one._queue._held == 0
        done = list(calls)
        one.state()
        assert calls == done

    def test_waiting_tokens_are_not_added_to_a_loaded_state(self) -> None:
        """The tokens belong to a batch that was interrupted."""
        one, fresh = (estimators("qk", 20, 24, "sylva", "paper") for _ in range(2))
        one.update("q", *batch_of(30, 20, 24, 0))
        one.load_state(fresh.state().__getitem__, fresh.sharers())
        one.end_batch()
        assert not any(bool(tensor.any()) for tensor in one.state().values())


def regression(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    found: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return found


def model_and_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(48, 48), nn.GELU())]
    return nn.Sequential(*layers), [(torch.randn(12, 48), torch.randn(12, 48)) for _ in range(3)]


def traced() -> sylva_compile.Masks:
    model, data = model_and_data()
    return sylva_compile.trace_and_mask(
        model,
        data,
        score="paper",
        rank=2,
        loss_fn=regression,
        block_size=8,
        sparsity=0.7,
        num_samples=36,
        progress=False,
    )


def living_queues() -> Iterator[UpdateQueue[Any]]:
    gc.collect()
    return (found for found in gc.get_objects() if type(found) is UpdateQueue)


class TestTracing:
    def test_masks_are_those_of_single_updates(self, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        together = traced()
        assert calls == [8] * 3
        monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", 0)
        assert dict(together) == dict(traced())

    def test_a_batch_that_fails_half_way_leaves_no_queue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = traced()
        update, left = Kfac.update, 6

        def fail(self: Kfac, *given: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                assert any(queue._held for queue in living_queues())
                raise KeyboardInterrupt
            update(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Kfac, "update", fail)
            try:
                traced()
            except KeyboardInterrupt:
                pass
            else:
                pytest.fail("it was not interrupted")
        assert not list(living_queues())
        assert dict(traced()) == dict(expected)
