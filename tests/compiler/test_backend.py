"""Tests of the backend: its report, its recompilations, and that compiled layers never share a mask."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_invariant, block_gradients, blocks_by_loops, dense_gradients, random_masks
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.compiler import backend as backend_module
from sylva_compile.errors import ArgumentError, MaskError, RewriteError

NAMES = ["0.weight", "2.weight"]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).relu()


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class NotAProduct(nn.Module):
    """A layer whose weight gradient is a matrix product, and one whose weight gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 24)
        self.table = nn.Embedding(10, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.table(ids))


class TestReport:
    def test_before_and_after_the_first_call(self) -> None:
        model = small()
        backend = sylva_compile.backend(random_masks(model, NAMES, 16, 0.2), inner="aot_eager")
        compiled = torch.compile(model, backend=backend)
        assert backend.report().rewritten == 0
        assert "not compiled" in str(backend.report()["0.weight"])
        compiled(torch.randn(3, 40)).sum().backward()
        assert backend.report().rewritten == 2
        assert "2 of 2 weights rewritten." in str(backend.report())

    def test_a_miss_is_named_and_right(self, caplog: pytest.LogCaptureFixture) -> None:
        model = NotAProduct()
        reference = copy.deepcopy(model)
        masks = random_masks(model, ["lin.weight", "table.weight"], 8, 0.5)
        backend = sylva_compile.backend(masks, inner="aot_eager")
        ids = torch.tensor([1, 5, 5])
        torch.compile(model, backend=backend)(ids).square().sum().backward()
        report = backend.report()
        assert report["lin.weight"].rewritten
        assert "embedding" in (report["table.weight"].reason or "")
        assert "table.weight" in caplog.text
        dense = dense_gradients(reference, reference(ids).square().sum(), list(masks))
        for name, found in block_gradients(model, masks).items():
            torch.testing.assert_close(found, blocks_by_loops(dense[name], masks[name]))

    def test_on_miss_error_raises_the_reason(self) -> None:
        model = NotAProduct()
        masks = random_masks(model, ["lin.weight", "table.weight"], 8, 0.5)
        compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
        with pytest.raises(RewriteError, match=r"table\.weight") as caught:
            compiled(torch.tensor([1, 5]))
        # Dynamo adds lines of its own below ours.
        first = str(caught.value).splitlines()[0]
        assert "embedding" in first
        assert "on_miss='warn'" in first

    def test_on_miss_ignore_is_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        model = NotAProduct()
        masks = random_masks(model, ["table.weight"], 8, 0.5)
        with caplog.at_level(logging.WARNING, "sylva_compile"):
            torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="ignore"))(
                torch.tensor([1])
            )
        assert "table.weight" not in caplog.text

    def test_a_weight_outside_of_the_compiled_part(self) -> None:
        model = nn.Sequential(small(), Wrapped())
        names = ["0.0.weight", "1.lin.weight"]
        backend = sylva_compile.backend(random_masks(model, names, 16, 0.5), inner="aot_eager")
        model[1].compile(backend=backend)
        model(torch.randn(3, 40)).sum().backward()
        assert "not compiled" in str(backend.report()["0.0.weight"])
        assert backend.report()["1.lin.weight"].rewritten

    def test_reading_a_weight_is_no_graph_of_its_own(self) -> None:
        """Dynamo does not compile `nn.Linear` alone; it must not compile our property in its stead."""
        model = small()
        backend = sylva_compile.backend(random_masks(model, NAMES, 16, 0.5), inner="aot_eager")
        model[0].compile(backend=backend)
        counters.clear()
        model(torch.randn(3, 40)).sum().backward()
        assert counters["stats"]["unique_graphs"] == 0
        assert "not compiled" in str(backend.report()["0.weight"])

    def test_what_dynamo_cannot_trace_is_dense_and_right(self) -> None:
        """T5 marks a bias as trainable inside of a checkpointed layer, so that layer runs uncompiled."""
        case = tiny("t5")
        reference = copy.deepcopy(case.model)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        case.model.activation_checkpointing_enable()
        backend = sylva_compile.backend(masks, inner="aot_eager")
        torch.compile(case.model, backend=backend)(**case.batch).loss.backward()
        missed = {name for name, weight in backend.report().items() if not weight.rewritten}
        assert missed
        assert all(name.startswith("decoder.block.0.") for name in missed)
        dense = dense_gradients(reference, reference(**case.batch).loss, list(masks))
        for name, found in block_gradients(case.model, masks).items():
            torch.testing.assert_close(found, blocks_by_loops(dense[name], masks[name]))


class TestArguments:
    def test_unknown_choices(self) -> None:
        with pytest.raises(ArgumentError, match="'inductor' or 'aot_eager'"):
            sylva_compile.backend(inner="eager")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="'warn', 'error' or 'ignore'"):
            sylva_compile.backend(on_miss="raise")  # type: ignore[arg-type]

    @pytest.mark.parametrize("asked", [{"mode": "reduce-overhead"}, {"options": {"max_fusion_size": 8}}], ids=str)
    def test_modes_without_code_generation_are_refused(self, asked: dict[str, Any]) -> None:
        model = small()
        backend = sylva_compile.backend(random_masks(model, NAMES, 16, 0.5), inner="aot_eager")
        with pytest.raises(ArgumentError, match="inner='inductor'"):
            torch.compile(model, backend=backend, **asked)(torch.randn(3, 40))

    def test_a_model_in_place_of_masks(self) -> None:
        with pytest.raises(ArgumentError, match="Sequential; give those that trace_and_mask"):
            sylva_compile.backend(small())  # type: ignore[arg-type]

    def test_unbound_masks(self) -> None:
        masks = Masks(dict(random_masks(small(), NAMES, 16, 0.5)))
        with pytest.raises(MaskError, match="not bound"):
            sylva_compile.backend(masks)

    def test_embeds_bound_masks(self) -> None:
        model = small()
        sylva_compile.backend(random_masks(model, NAMES, 16, 0.5))
        assert model.get_parameter("0.weight_blocks").requires_grad

    def test_registered_by_name(self) -> None:
        assert "sylva" in torch._dynamo.list_backends(exclude_tags=())


class TestLayersOneByOne:
    @pytest.mark.parametrize("unequal", [False, True], ids=["equal-counts", "unequal-counts"])
    def test_do_not_share_masks(self, unequal: bool) -> None:
        case = tiny("llama")
        reference = copy.deepcopy(case.model)
        maps = {}
        for name, parameter in case.model.model.named_parameters(prefix="model"):
            if parameter.dim() == 2 and "layers" in name:
                grid = torch.zeros(-(-parameter.shape[0] // 8), -(-parameter.shape[1] // 8), dtype=torch.bool)
                second = "layers.1" in name
                count = 5 if unequal and second else 3
                grid.view(-1)[-count:] = second
                grid.view(-1)[:count] |= not second
                maps[name] = grid
        masks = Masks.from_block_maps(case.model, maps, 8)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        for layer in case.model.model.layers:
            layer.compile(backend=backend)
        counters.clear()
        case.model(**case.batch).loss.backward()
        dense = dense_gradients(reference, reference(**case.batch).loss, list(masks))
        for name, found in block_gradients(case.model, masks).items():
            torch.testing.assert_close(found, blocks_by_loops(dense[name], masks[name]), msg=name)
        assert backend.report().rewritten == len(masks) == 14
        if not unequal:
            # Layers alike share one compiled graph, though their masks differ.
            assert counters["stats"]["unique_graphs"] == 1

    def test_two_models_with_one_backend_name(self) -> None:
        models = [small(), small()]
        references = [copy.deepcopy(model) for model in models]
        masks = [random_masks(model, NAMES, 16, 0.4) for model in models]
        x = torch.randn(5, 40)
        for model, bound in zip(models, masks, strict=True):
            bound.embed()
            torch.compile(model, backend="sylva", options={"fallback_random": True})(x).square().sum().backward()
        for model, bound, reference in zip(models, masks, references, strict=True):
            dense = dense_gradients(reference, reference(x).square().sum(), NAMES)
            for name, found in block_gradients(model, bound).items():
                torch.testing.assert_close(found, blocks_by_loops(dense[name], bound[name]))


class TestRecompilation:
    def test_none_after_the_second_length(self) -> None:
        case = tiny("llama", length=16)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        reference = copy.deepcopy(case.model)
        compiled = torch.compile(case.model, backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))

        def step(model: Callable[..., Any], length: int) -> Tensor:
            loss: Tensor = model(**{key: value[:, :length] for key, value in case.batch.items()}).loss
            return loss

        for length in (16, 11):
            step(compiled, length).backward()
        case.model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (9, 14, 5, 16):
                step(compiled, length).backward()
        dense = dense_gradients(reference, sum(step(reference, length) for length in (9, 14, 5, 16)), list(masks))
        for name, found in block_gradients(case.model, masks).items():
            torch.testing.assert_close(found, blocks_by_loops(dense[name], masks[name]), rtol=1e-4, atol=1e-6)

    def test_other_masks_on_the_same_model_are_not_stale(self) -> None:
        model = small()
        reference = copy.deepcopy(model)
        x = torch.randn(5, 40)
        dense = dense_gradients(reference, reference(x).square().sum(), NAMES)
        for seed in range(3):
            torch.manual_seed(seed)
            masks = random_masks(model, NAMES, 16, 0.4)
            compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager"))
            compiled(x).square().sum().backward()
            for name, found in block_gradients(model, masks).items():
                torch.testing.assert_close(found, blocks_by_loops(dense[name], masks[name]))
            sylva_compile.unload_adapter(model)
        assert torch.equal(model(x), reference(x))

    def test_embedding_again_on_a_compiled_model_is_followed(self) -> None:
        model = Wrapped()
        x = torch.randn(5, 30)
        old = []
        for round_ in range(3):
            # Equal counts, so that nothing is compiled again; and the old states stay alive, as guards may keep them.
            block_map = torch.arange(16).view(4, 4) % 3 == round_ % 2 + 1
            masks = Masks.from_block_maps(model, {"lin.weight": block_map}, 8)
            old.append(block_states(masks.embed()))
            backend = sylva_compile.backend(masks, inner="aot_eager")
            if round_ == 0:
                model.compile(backend=backend)
            model(x).square().sum().backward()
            with torch.no_grad():
                masks.parameters()[0].add_(1.0)
            out = model(x)
            assert_invariant(model, masks)
            sylva_compile.merge_and_unload(model)
            torch.testing.assert_close(out, (x @ model.lin.weight.t() + model.lin.bias).relu())

    @pytest.mark.parametrize("partly", [True, False])
    def test_a_graph_that_first_ran_with_an_average_follows_the_model(self, partly: bool) -> None:
        model = Stack()
        masks = random_masks(model, ["body.0.weight", "body.2.weight"], 16, 0.4)
        backend = sylva_compile.backend(masks, inner="aot_eager")
        average = {
            name: nn.Parameter(p.detach() * 0.9, requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
            if not name.endswith("_blocks") and not (partly and "body.2" in name)
        }
        model.compile(backend=backend)
        x = torch.randn(5, 40)
        with torch.no_grad():
            torch.func.functional_call(model, average, (x,))
            for blocks in masks.parameters():
                blocks.mul_(3.0)
            found = model(x)
            assert_invariant(model, masks)
            assert torch.equal(found, model.forward(x))

    def test_a_weight_that_is_embedded_later_is_followed(self) -> None:
        # Frozen already, so that no guard of Dynamo's sees the difference.
        weight = Wrapped().requires_grad_(False)
        apply = torch.compile(lambda x, w: x @ w.t(), backend=sylva_compile.backend(inner="aot_eager"))
        x = torch.randn(5, 30)
        with torch.no_grad():
            apply(x, weight.lin.weight)
            masks = Masks.from_block_maps(weight, {"lin.weight": torch.eye(4, dtype=torch.bool)}, 8)
            masks.parameters()[0].add_(1.0)
            found = apply(x, weight.lin._parameters["weight"])
            torch.testing.assert_close(found, x @ weight.lin.weight.t())

    def test_layers_that_exchange_their_weights_are_followed(self) -> None:
        model = nn.ModuleList([Wrapped(), Wrapped()])
        block_map = torch.eye(4, dtype=torch.bool)
        masks = Masks.from_block_maps(model, {"0.lin.weight": block_map, "1.lin.weight": block_map.flip(0)}, 8)
        backend = sylva_compile.backend(masks, inner="aot_eager")
        x = torch.randn(5, 30)
        for layer in model:
            layer.compile(backend=backend)
            layer(x).sum().backward()
        first, second = (state.weight for state in block_states(model).values())
        model[0].lin.weight, model[1].lin.weight = second, first
        for layer, blocks in zip(model, masks.parameters(), strict=True):
            with torch.no_grad():
                blocks.add_(1.0)
            found = layer(x)
            torch.testing.assert_close(found, (x @ layer.lin.weight.t() + layer.lin.bias).relu())

    def test_a_fallen_back_model_is_right_after_unload(self) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.4)
        compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager"))
        x = torch.randn(5, 40)
        compiled(x).sum().backward()
        sylva_compile.merge_and_unload(model)
        compiled(x).sum().backward()
        assert model[0].weight.grad is not None


class TestWhatIsNotMasked:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_biases_norms_embeddings_and_head_get_their_gradients(self, architecture: str) -> None:
        case = tiny(architecture)
        reference = copy.deepcopy(case.model)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8)
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
        case.model(**case.batch).loss.backward()
        reference(**case.batch).loss.backward()
        others = {name: p for name, p in case.model.named_parameters() if p.requires_grad and "_blocks" not in name}
        assert any("norm" in name or "ln_" in name for name in others)
        assert not others.keys() & masks.keys()
        for name, parameter in others.items():
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, msg=name)


class TestEvaluation:
    def test_the_graph_holds_nothing_of_ours(self) -> None:
        case = tiny("llama")
        sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=8).embed()
        graphs: list[torch.fx.GraphModule] = []

        def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(gm)
            return gm.forward

        case.model.eval()
        with torch.no_grad():
            torch.compile(case.model, backend=look)(**case.batch)
        text = "".join(gm.print_readable(print_output=False) for gm in graphs)
        assert graphs
        assert "linear" in text
        assert "sylva" not in text
        assert "autograd_function" not in text


class TestInductor:
    @pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
    def test_a_training_run_equals_the_uncompiled_one(self, autocast: bool) -> None:
        case = tiny("llama", length=16)
        twin = copy.deepcopy(case.model)
        masks = sylva_compile.trace_and_mask(case.model, method="random", sparsity=0.7, block_size=16)
        twin_masks = Masks(masks, model=twin)
        backend = sylva_compile.backend(masks, on_miss="error")
        compiled = torch.compile(case.model, backend=backend)
        losses: list[list[float]] = [[], []]
        for model, bound, kept in ((compiled, masks, losses[0]), (twin, twin_masks, losses[1])):
            optimizer = torch.optim.SGD(bound.parameters(), lr=0.05, momentum=0.9)
            for index in range(6):
                batch = {key: value[:, : 16 - 3 * (index % 3)] for key, value in case.batch.items()}
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                kept.append(float(loss.detach()))
        assert backend.report().rewritten == len(masks)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2 if autocast else 1e-5, atol=0)
        assert_invariant(case.model, masks)
        for name in masks:
            tolerance = 5e-3 if autocast else 1e-5
            torch.testing.assert_close(
                case.model.get_parameter(name), twin.get_parameter(name), rtol=tolerance, atol=tolerance
            )

    @pytest.mark.parametrize(
        ("asked", "found"),
        [
            ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
            ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True}),
            ({"options": {"max_fusion_size": 8}}, {"max_fusion_size": 8}),
        ],
        ids=str,
    )
    def test_modes_and_options_reach_inductor(
        self, asked: dict[str, Any], found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        patches: list[dict[str, Any]] = []

        def spy(gm: Any, inputs: Any, config_patches: dict[str, Any]) -> Any:
            patches.append(config_patches)
            return compile_fx(gm, inputs, config_patches=config_patches)

        monkeypatch.setattr(backend_module, "compile_fx", spy)
        model = small()
        reference, x = copy.deepcopy(model), torch.randn(3, 40)
        masks = random_masks(model, NAMES, 16, 0.4)
        torch.compile(model, backend=sylva_compile.backend(masks, on_miss="error"), **asked)(x).sum().backward()
        assert patches
        assert all(found.items() <= patch.items() for patch in patches)
        dense = dense_gradients(reference, reference(x).sum(), NAMES)
        for name, gradient in block_gradients(model, masks).items():
            torch.testing.assert_close(gradient, blocks_by_loops(dense[name], masks[name]))

    def test_dynamic_shapes_from_the_first_call(self) -> None:
        model = small()
        reference = copy.deepcopy(model)
        masks = random_masks(model, NAMES, 16, 0.4)
        compiled = torch.compile(model, backend=sylva_compile.backend(masks, on_miss="error"), dynamic=True)
        inputs = [torch.randn(tokens, 40) for tokens in (5, 9, 300, 2)]
        compiled(inputs[0]).square().sum().backward()
        model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x in inputs:
                compiled(x).square().sum().backward()
        dense = dense_gradients(reference, sum(reference(x).square().sum() for x in inputs), NAMES)
        for name, gradient in block_gradients(model, masks).items():
            torch.testing.assert_close(gradient, blocks_by_loops(dense[name], masks[name]), rtol=1e-4, atol=1e-4)

    def test_a_second_compilation_finds_its_rewrites_too(self) -> None:
        """A graph from a cache must not lose the pass, nor its report."""
        x = torch.randn(5, 40)
        for _ in range(2):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = small()
            backend = sylva_compile.backend(random_masks(model, NAMES, 16, 0.4), on_miss="error")
            torch.compile(model, backend=backend)(x).sum().backward()
            assert backend.report().rewritten == 2


class TestCacheKey:
    """A changed pass or kernel must not find graphs in Inductor's cache that the old one has rewritten."""

    def key(self) -> bytes:
        """As a new process finds it."""
        backend_module.source_hash.cache_clear()
        backend_module.get_hash_for_files.cache_clear()
        found: bytes = backend_module._JointPass(None, lambda results: None).uuid()[0]
        return found

    @pytest.mark.parametrize(
        "file", ["passes/merge_products.py", "kernels/gather_blocks.py", "kernels/sddmm/op.py", "compiler/retrace.py"]
    )
    def test_changes_with_a_file(self, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = Path(sylva_compile.__file__).parent
        copy_of_package = tmp_path / "sylva_compile"
        shutil.copytree(package, copy_of_package, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(backend_module, "_PACKAGE", copy_of_package)
        before = self.key()
        assert self.key() == before
        with (copy_of_package / file).open("a") as source:
            source.write("\n# changed\n")
        assert self.key() != before
        monkeypatch.undo()
        backend_module.source_hash.cache_clear()

    def test_reads_every_file_of_the_rooms(self) -> None:
        package = Path(sylva_compile.__file__).parent
        hashed = {path for room in backend_module._HASHED_ROOMS for path in (package / room).rglob("*.py")}
        assert package == backend_module._PACKAGE
        # Both ends of a moved folder: an empty room would be a key that never changes.
        for room in backend_module._HASHED_ROOMS:
            assert len([path for path in hashed if room in path.parts]) > 4

    def test_of_a_pass_of_the_users_that_has_none_switches_caching_off(self) -> None:
        assert backend_module._JointPass(lambda graph: None, lambda results: None).uuid() is None


def test_equal_names_of_two_models_have_a_line_each() -> None:
    backend = sylva_compile.backend(inner="aot_eager")
    before = len(backend.report())
    models = [small(), small()]
    for model in models:
        random_masks(model, NAMES, 16, 0.5).embed()
    torch.compile(models[1], backend=backend)(torch.randn(3, 40)).sum().backward()
    report = backend.report()
    assert len(report) == before + 4
    assert report.rewritten == 2
    rewritten = {name for name, weight in report.items() if weight.rewritten}
    # Other tests' models may be alive too; the numbers say which model of the process it is.
    assert {name.partition(" (")[0] for name in rewritten} == set(NAMES)
    assert all(name.endswith(")") for name in rewritten)
