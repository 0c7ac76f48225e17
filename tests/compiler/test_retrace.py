"""Tests of second traces: shared input channels, dynamic sizes, and one retrace before any code is generated."""

import copy
import logging
from typing import Any

import pytest
import torch
from oracle import block_gradients, blocks_by_loops, dense_gradients, random_masks
from quantised_models import needs_torchao, quantise, quiet
from tiny_models import Case, checkpoint, tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sylva_compile
from sylva_compile import Masks
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.scope import layer_numbers
from sylva_compile.compiler import backend as backend_module
from sylva_compile.compiler.retrace import _pattern, _same_in_all_layers
from sylva_compile.kernels.sddmm.op import sddmm
from sylva_compile.kernels.sddmm.shared_op import sddmm_shared
from sylva_compile.passes import runner
from sylva_compile.passes.dataflow import dataflow_of, tangent_dependents

PRODUCTS = {torch.ops.aten.mm.default, sddmm._opoverload, sddmm_shared._opoverload}


@pytest.fixture(autouse=True)
def _sources_as_before() -> Any:
    before = torch.compiler.config.dynamic_sources
    yield
    torch.compiler.config.dynamic_sources = before


class Attention(nn.Module):
    """Three layers that read one activation, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(48, 20), nn.Linear(48, 24), nn.Linear(48, 17)
        self.last = nn.Linear(20, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        return self.last(self.first(x)).sum() + self.second(x).square().sum() + self.third(x).sum()


class Layer(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


NAMES = ["first.weight", "second.weight", "third.weight", "last.weight"]


def check_gradients(model: nn.Module, masks: Masks, reference: nn.Module, loss: Tensor) -> None:
    dense = dense_gradients(reference, loss, list(masks))
    for name, found in block_gradients(model, masks).items():
        wanted = blocks_by_loops(dense[name], masks[name])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


class TestSharedActivations:
    def test_three_weights_get_one_tensor_of_lines(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Attention()
        reference, x = copy.deepcopy(model), torch.randn(5, 48)
        masks = random_masks(model, NAMES, 8, 0.2)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        compiled = torch.compile(model, backend=backend)
        counters.clear()
        with caplog.at_level(logging.INFO, "sylva_compile"):
            for _ in range(2):
                model.zero_grad()
                compiled(x).backward()
        lines = [state.layout.input_channels for state in block_states(model).values()]
        assert lines[0] is lines[1] is lines[2]
        assert lines[3] is not lines[0]
        assert caplog.text.count("traced again") == 1
        assert "sddmm_shared" in caplog.text
        assert counters["stats"]["unique_graphs"] == 1
        assert backend.report().rewritten == 4
        check_gradients(model, masks, reference, reference(x))

    @pytest.mark.parametrize("empty", [0, 1])
    def test_with_an_empty_mask_among_them(self, empty: int) -> None:
        model = Attention()
        reference, x = copy.deepcopy(model), torch.randn(5, 48)
        maps = {name: torch.ones(-(-model.get_parameter(name).shape[0] // 8), 6) > 0 for name in NAMES[:3]}
        maps = {name: grid & (torch.arange(6) == index) for index, (name, grid) in enumerate(maps.items())}
        maps[NAMES[empty]][:] = False
        masks = Masks.from_block_maps(model, maps, 8)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        torch.compile(model, backend=backend)(x).backward()
        check_gradients(model, masks, reference, reference(x))

    def test_a_backend_without_a_model_learns_nothing(self) -> None:
        model = Attention()
        reference, x = copy.deepcopy(model), torch.randn(5, 48)
        masks = random_masks(model, NAMES, 8, 0.3)
        masks.embed()
        torch.compile(model, backend=sylva_compile.backend(inner="aot_eager"))(x).backward()
        lines = [state.layout.input_channels for state in block_states(model).values()]
        assert lines[0] is not lines[1]
        check_gradients(model, masks, reference, reference(x))

    def test_alike_are_the_same_weights_of_other_layers(self) -> None:
        states: dict[str, Any] = {f"m.{layer}.{name}.weight": None for layer in range(4) for name in ("q", "k", "o")}
        group = {"m.1.q.weight", "m.1.k.weight"}
        found = _same_in_all_layers(states, {"m.3.q.weight"}, group)
        assert found == [{f"m.{layer}.q.weight", f"m.{layer}.k.weight"} for layer in (0, 1, 2)]
        across = {"m.1.q.weight", "m.2.k.weight"}
        assert _same_in_all_layers(states, set(), across) == [across]

    def test_numbers_of_layers_are_whole_parts_of_a_name(self) -> None:
        assert layer_numbers("layers.10.w1.weight") == ("10",)
        assert _pattern("layers.10.w1.weight") == "layers.*.w1.weight"


def unequal_masks(case: Case, *, least: int = 2) -> Masks:
    """Make masks of a Llama's two layers that differ in every count of blocks and of input channels."""
    maps = {}
    for serial, (name, weight) in enumerate(case.model.model.layers.named_parameters(prefix="model.layers")):
        if weight.dim() == 2:
            grid = torch.zeros(-(-weight.shape[0] // 8), -(-weight.shape[1] // 8), dtype=torch.bool)
            count = least + serial % 3 if "layers.0" in name else least + 3 + serial % 2
            grid.view(-1)[torch.randperm(grid.numel())[:count]] = True
            maps[name] = grid
    return Masks.from_block_maps(case.model, maps, 8)


def step(model: Any, case: Case, length: int) -> Tensor:
    return model(**{key: value[:, :length] for key, value in case.batch.items()}).loss


class TestLayersOneByOne:
    @pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
    def test_unequal_masks_and_lengths_compile_nothing_after_the_warm_up(self, checkpointed: bool) -> None:
        case = tiny("llama", length=16)
        case.model.requires_grad_(False)
        case.model.get_input_embeddings().weight.requires_grad_(True)  # so that both layers are given a gradient
        reference = copy.deepcopy(case.model).requires_grad_(True)
        masks = unequal_masks(case)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        if checkpointed:
            checkpoint(case.model)
        for layer in case.model.model.layers:
            layer.compile(backend=backend)
        counters.clear()
        step(case.model, case, 16).backward()
        if not checkpointed:
            assert counters["stats"]["unique_graphs"] == 1, "two layers, one artifact"
        step(case.model, case, 11).backward()
        case.model.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (9, 14, 5, 16):
                step(case.model, case, length).backward()
        assert backend.report().rewritten == len(masks) == 14
        check_gradients(case.model, masks, reference, sum(step(reference, case, length) for length in (9, 14, 5, 16)))

    def test_a_mask_of_one_block_or_none_costs_a_graph_of_its_own_and_is_right(self) -> None:
        case = tiny("llama", length=8)
        reference = copy.deepcopy(case.model)
        masks = unequal_masks(case, least=0)
        assert {mask.nnz for mask in masks.values()} >= {0, 1}
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        for layer in case.model.model.layers:
            layer.compile(backend=backend)
        case.model(**case.batch).loss.backward()
        check_gradients(case.model, masks, reference, reference(**case.batch).loss)

    @pytest.mark.parametrize("kind", [None, pytest.param("torchao-int8", marks=[needs_torchao, quiet])])
    def test_an_evaluation_before_training_compiles_one_graph_for_all_masks(self, kind: str | None) -> None:
        layers = nn.ModuleList(Layer(nn.Linear(32, 32)) for _ in range(9))
        if kind is not None:
            quantise(layers, kind)
        grids = {f"{number}.body.weight": torch.arange(16).view(4, 4) < number + 2 for number in range(9)}
        masks = Masks.from_block_maps(layers, grids, 8)
        backend = sylva_compile.backend(masks, inner="aot_eager")
        x = torch.randn(3, 32)
        counters.clear()
        for layer in layers:
            layer.compile(backend=backend)
        with torch.no_grad():
            for layer in layers:
                layer(x)
        assert counters["stats"]["unique_graphs"] == 1
        for layer in layers:
            layer(x).sum().backward()
        assert backend.report().rewritten == len(masks)

    def test_a_copy_has_one_graph_too_when_the_original_is_gone(self) -> None:
        case = tiny("llama", length=16, layers=3)
        case.model.requires_grad_(False)
        case.model.get_input_embeddings().weight.requires_grad_(True)
        masks = unequal_masks(case)

        def compile_layers(model: nn.Module, masks: Masks) -> None:
            backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
            for layer in model.model.layers:
                layer.compile(backend=backend)
            counters.clear()
            model(**case.batch).loss.backward()
            assert counters["stats"]["unique_graphs"] == 1
            assert backend.report().rewritten == len(masks)

        compile_layers(case.model, masks)
        twin = copy.deepcopy(case.model)
        for layer in twin.model.layers:
            layer._compiled_call_impl = None
        twin.zero_grad()
        torch._dynamo.reset()
        sylva_compile.unload_adapter(case.model)
        compile_layers(twin, Masks(dict(masks), model=twin))

    def test_a_model_compiled_as_a_whole_keeps_its_sizes_fixed(self) -> None:
        case = tiny("llama", length=8)
        masks = unequal_masks(case)
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
        case.model(**case.batch).loss.backward()
        for state in block_states(case.model).values():
            assert not hasattr(state.layout.positions, "_dynamo_weak_dynamic_indices")

    def test_generated_code_serves_unequal_masks(self) -> None:
        case = tiny("llama", length=16)
        case.model.requires_grad_(False)
        case.model.get_input_embeddings().weight.requires_grad_(True)
        reference = copy.deepcopy(case.model).requires_grad_(True)
        masks = unequal_masks(case)
        backend = sylva_compile.backend(masks, on_miss="error")
        for layer in case.model.model.layers:
            layer.compile(backend=backend)
        counters.clear()
        case.model(**case.batch).loss.backward()
        assert counters["stats"]["unique_graphs"] == 1
        check_gradients(case.model, masks, reference, reference(**case.batch).loss)


class TestBelowTheLowestTrainedBlock:
    def backward_products(self, layers: int, trained: int, monkeypatch: pytest.MonkeyPatch) -> int:
        """Count the matrix products in the backward of a Llama with one trained layer; a shared launch counts once."""
        graphs: list[Any] = []
        run = runner.run_passes

        def keep(graph: Any, passes: Any) -> int:
            graphs.append(graph)
            return run(graph, passes)

        monkeypatch.setattr(backend_module, "run_passes", keep)
        case = tiny("llama", length=8, layers=layers)
        case.model.requires_grad_(False)
        scope = rf".*layers\.{trained}\..*"
        masks = sylva_compile.trace_and_mask(case.model, method="random", scope=scope, sparsity=0.7, block_size=8)
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
        case.model(**case.batch).loss.backward()
        monkeypatch.undo()
        backward = tangent_dependents(dataflow_of(graphs[-1]))
        return sum(node.target in PRODUCTS for node in backward)

    def test_there_is_no_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = self.backward_products(1, 0, monkeypatch)
        above_another = self.backward_products(2, 1, monkeypatch)
        below_another = self.backward_products(2, 0, monkeypatch)
        assert 0 < alone == above_another < below_another
