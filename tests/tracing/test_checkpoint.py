"""An interrupted trace resumes and ends with the same masks, or an error says why it cannot resume."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.curvature import update_queue
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.errors import ArgumentError, TraceError
from sylva_compile.tracing import checkpoint
from sylva_compile.tracing import trace as trace_module

Batch = tuple[Tensor, Tensor]


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 32))


def batches(count: int = 8, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 40, generator=generator), torch.randn(4, 32, generator=generator)) for _ in range(count)]


def noisy_regression(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss that draws random numbers; a resumed trace must draw the same ones."""
    return (model(batch[0]) - batch[1] + torch.randn(32)).square().mean()


def broken_off(data: list[Batch], after: int) -> Iterator[Batch]:
    yield from data[:after]
    raise KeyboardInterrupt


def trace(loader: Any, path: Path | None = None, model: nn.Module | None = None, **options: Any) -> Masks:
    settings: dict[str, Any] = {"block_size": 8, "sparsity": 0.7, "num_samples": 32, "progress": False}
    settings |= {"loss_fn": noisy_regression, "checkpoint": path, "checkpoint_every": 2} | options
    torch.manual_seed(1)
    return sylva_compile.trace_and_mask(model or model_of(), loader, **settings)


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    path = tmp_path / "trace.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trace(broken_off(batches(), 5), path)
    assert path.exists()
    return path


class TestGoingOn:
    @pytest.mark.parametrize(
        ("options", "group_bytes"),
        [
            ({"method": "sylva"}, 0),
            ({"method": "sylva", "score": "gain"}, 0),
            ({"method": "sylva", "score": "paper"}, 0),
            # Updates are queued and applied together, those of all factors or of a few at a time.
            ({"method": "sylva", "score": "paper", "rank": 2}, 2**30),
            ({"method": "sylva", "score": "paper", "rank": 2}, 150_000),
            ({"method": "kfac"}, 0),
            ({"method": "fisher"}, 0),
        ],
    )
    def test_the_scores_are_those_of_an_uninterrupted_trace(
        self, options: dict[str, Any], group_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(update_queue, "GROUP_BYTES_ON_CPU", group_bytes)
        scores: list[list[Tensor]] = []
        compute = sylva_compile.curvature.estimators.Estimators.scores

        def record(self: Any, name: str) -> Tensor:
            scores[-1].append(compute(self, name))
            return scores[-1][-1]

        monkeypatch.setattr(sylva_compile.curvature.estimators.Estimators, "scores", record)
        path = tmp_path / "trace.safetensors"
        with pytest.raises(KeyboardInterrupt):
            trace(broken_off(batches(), 5), path, **options)
        scores.append([])
        resumed = trace(batches(), path, **options)
        scores.append([])
        whole = trace(batches(), **options)
        assert dict(resumed) == dict(whole)
        assert all(torch.equal(*pair) for pair in zip(*scores, strict=True))
        assert not path.exists()

    def test_only_what_came_after_the_checkpoint_is_observed(
        self, interrupted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        updates: list[int] = []
        update = Kfac.update
        monkeypatch.setattr(Kfac, "update", lambda self, *given: (updates.append(1), update(self, *given))[1])
        trace(batches(), interrupted)
        assert len(updates) == 2 * (8 - 4)

    def test_a_trace_that_was_complete_ends_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "trace.safetensors"
        monkeypatch.setattr(trace_module, "select_blocks", lambda *args: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            trace(batches(), path)
        monkeypatch.undo()
        with pytest.raises(TraceError, match="other batches"):
            trace(batches(seed=1), path)
        assert dict(trace(batches(), path)) == dict(trace(batches()))

    def test_other_masks_can_be_made_of_what_was_gathered(self, interrupted: Path) -> None:
        masks = trace(batches(), interrupted, sparsity=0.5, damping=0.3)
        assert dict(masks) == dict(trace(batches(), sparsity=0.5, damping=0.3))

    def test_a_killed_process(self, tmp_path: Path) -> None:
        path = tmp_path / "trace.safetensors"
        script = textwrap.dedent(
            f"""
            import os, signal
            from test_checkpoint import batches, trace

            def killed():
                yield from batches()[:5]
                os.kill(os.getpid(), signal.SIGKILL)

            trace(killed(), {str(path)!r})
            """
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=False, timeout=300)
        assert done.returncode == -signal.SIGKILL
        assert dict(trace(batches(), path)) == dict(trace(batches()))


class TestRefusals:
    """Every refusal leaves the file unchanged, so that the right call can still resume from it."""

    def check(
        self, path: Path, message: str, loader: Any = None, model: nn.Module | None = None, **options: Any
    ) -> None:
        before = path.read_bytes()
        with pytest.raises(TraceError, match=message) as caught:
            trace(batches() if loader is None else loader, path, model, **options)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before

    def test_another_model(self, interrupted: Path) -> None:
        self.check(interrupted, "another base model", model=model_of(1))

    def test_another_weight_out_of_scope(self, tmp_path: Path) -> None:
        """A newly initialised head changes every gradient, although the head is not traced."""
        path, model = tmp_path / "trace.safetensors", model_of()
        with pytest.raises(KeyboardInterrupt):
            trace(broken_off(batches(), 5), path, model, scope=["0"])
        torch.nn.init.normal_(model[2].weight)
        self.check(path, "another base model", model=model, scope=["0"])

    def test_another_configuration(self, tmp_path: Path) -> None:
        """Another model may have the same values: no tensor holds the number of heads."""

        class Config:
            def __init__(self, heads: int) -> None:
                self.heads, self._name_or_path = heads, f"from here {heads}"

            def to_dict(self) -> dict[str, Any]:
                return vars(self)

        path, model = tmp_path / "trace.safetensors", model_of()
        model.config = Config(2)
        with pytest.raises(KeyboardInterrupt):
            trace(broken_off(batches(), 5), path, model)
        model.config = Config(4)
        self.check(path, "another configuration", model=model)

    def test_another_rank(self, interrupted: Path) -> None:
        self.check(interrupted, "another rank", rank=4)

    def test_another_score(self, interrupted: Path) -> None:
        self.check(interrupted, "another score", score="paper")

    def test_another_scope(self, interrupted: Path) -> None:
        self.check(interrupted, "another set of weights", scope=["0"])

    def test_other_batches(self, interrupted: Path) -> None:
        self.check(interrupted, "other batches", loader=batches(seed=1))

    def test_batches_in_another_order(self, interrupted: Path) -> None:
        self.check(interrupted, "other batches", loader=batches()[::-1])

    @pytest.mark.parametrize("other", ["texts", "numbers", "arrays", "names"])
    def test_other_batches_without_tensors(self, other: str, tmp_path: Path) -> None:
        def batch(at: int, seed: int) -> dict[str, Any]:
            word = f"{seed}-{at}"
            return {
                "texts": {"text": [word]},
                "numbers": {"at": at + 100 * seed},
                "arrays": {"array": np.full(3, at + 100 * seed)},
                "names": {word: None},
            }[other]

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return model(torch.ones(4, 40)).square().mean()

        path = tmp_path / "trace.safetensors"
        first, second = ([batch(at, seed) for at in range(8)] for seed in (0, 1))
        with pytest.raises(KeyboardInterrupt):
            trace(broken_off(first, 5), path, loss_fn=loss)
        self.check(path, "other batches", loader=second, loss_fn=loss)
        assert dict(trace(first, path, loss_fn=loss)) == dict(trace(first, loss_fn=loss))

    def test_fewer_sequences_than_it_holds(self, interrupted: Path) -> None:
        self.check(interrupted, "holds 16 sequences already, and 12 are wanted", num_samples=12)

    def test_too_few_batches(self, interrupted: Path) -> None:
        self.check(interrupted, "other batches", loader=batches(3))

    def test_a_damaged_file(self, interrupted: Path) -> None:
        interrupted.write_bytes(interrupted.read_bytes()[:-100])
        self.check(interrupted, "damaged")

    def test_masks_in_its_place(self, tmp_path: Path) -> None:
        path = tmp_path / "masks.safetensors"
        trace(batches()).save(path)
        self.check(path, "no checkpoint of a trace")

    @pytest.mark.parametrize("name", [".", "file/trace.safetensors"])
    def test_a_place_where_nothing_can_be_written(self, name: str, tmp_path: Path) -> None:
        """The error comes at once, not after the first batches."""
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ArgumentError, match="cannot be written") as caught:
            trace(iter(lambda: pytest.fail("no batch is wanted"), None), tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_an_interval_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="checkpoint_every=0"):
            trace(batches(), tmp_path / "trace.safetensors", checkpoint_every=0)


class Pair:
    """A batch that is an object with a reference to itself."""

    def __init__(self, batch: Batch) -> None:
        self.inputs, self.targets = batch
        self.me = self


def of_pairs(model: nn.Module, batch: Pair) -> Tensor:
    return noisy_regression(model, (batch.inputs, batch.targets))


def test_batches_that_are_objects_are_told_apart(tmp_path: Path) -> None:
    data, path = [Pair(batch) for batch in batches()], tmp_path / "trace"
    with pytest.raises(KeyboardInterrupt):
        trace(broken_off(data, 5), path, loss_fn=of_pairs)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="other batches"):
        trace(data[::-1], path, loss_fn=of_pairs)
    assert trace(data, path, loss_fn=of_pairs) == trace(batches())


def test_batches_may_be_slices(tmp_path: Path) -> None:
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    keep = torch.ones(len(inputs), 3, dtype=torch.bool)
    data = [{"x": inputs[at : at + 1], "y": targets[at : at + 1], "keep": keep[at : at + 1]} for at in range(32)]
    trace(data, tmp_path / "trace", loss_fn=lambda model, batch: noisy_regression(model, (batch["x"], batch["y"])))


def test_a_full_disk_does_not_end_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert trace(batches(), tmp_path / "trace") == trace(batches())
    assert "trace cannot be written (I/O error: File too large); the trace goes on" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_crash_while_writing_leaves_the_older_checkpoint(interrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = interrupted.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(KeyboardInterrupt):
        trace(broken_off(batches(), 7), interrupted)
    assert interrupted.read_bytes() == before
    assert list(interrupted.parent.iterdir()) == [interrupted]
