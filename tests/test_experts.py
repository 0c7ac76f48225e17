"""Blocks in the stacked weights of experts: gradients, masks, adapters and refusals."""

import copy
from pathlib import Path

import pytest
import torch
from oracle import block_gradients, blocks_by_loops
from tiny_experts import EXPERTS, MIXTURES, VOCABULARY, Routed, experts_of, representable, tiny_mixture
from torch import Tensor, nn

import sylva_compile
from sylva_compile import Masks
from sylva_compile.adapters.export_shira import export_peft
from sylva_compile.errors import AdapterError, ArgumentError, EmbedError, ScopeError
from sylva_compile.kernels.blocks import as_matrix, grid_shape

# transformers asks for torch's version inside of the compiled code.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")

B = 8
STACKED = ("gate_up_proj", "down_proj")


def routing(kind: str) -> Tensor:
    """Return the two experts of each token, `[T, 2]`."""
    if kind == "one token":
        return torch.tensor([[2, 0]])
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(40)])
    # The last expert gets no token where one is to stay empty.
    return chosen if kind == "all" else torch.where(chosen == EXPERTS - 1, torch.tensor([[2, 1]]), chosen)


def random_masks(model: nn.Module, share: float = 0.4) -> Masks:
    """Blocks of every stacked weight, at random places of all experts."""
    maps = {
        name: torch.rand(*grid_shape(as_matrix(p).shape, B)) < share
        for name, p in model.named_parameters()
        if p.dim() == 3
    }
    return Masks.from_block_maps(model, maps, B)


class TestGradients:
    """The experts alone, so that a wider dtype sends no token to another expert."""

    @pytest.mark.parametrize("kind", ["all", "an empty expert", "one token"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("architecture", ["qwen3-moe", "mixtral", "gpt-oss"])
    def test_no_worse_than_the_dense_gradient(self, architecture: str, dtype: torch.dtype, kind: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        (experts,) = experts_of(tiny_mixture(architecture)).values()
        model = Routed(experts)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * representable(*parameter.shape)).copy_(parameter.bfloat16())
        model.to(dtype).requires_grad_(False)
        chosen = routing(kind)
        x, weigh = representable(len(chosen), 32).to(dtype), representable(len(chosen), 32)
        weights = torch.rand(chosen.shape).bfloat16().to(dtype)

        def loss_of(run: nn.Module, wide: torch.dtype) -> Tensor:
            return (run(x.to(wide), chosen, weights.to(wide)) * weigh.to(wide)).sum()

        names = [f"experts.{name}" for name in STACKED]
        dense_model = copy.deepcopy(model).requires_grad_(True)
        loss_of(dense_model, dtype).backward()
        exact_model = copy.deepcopy(model).double().requires_grad_(True)
        exact_model.experts.config = copy.deepcopy(experts.config)
        exact_model.experts.config._experts_implementation = "eager"
        loss_of(exact_model, torch.float64).backward()

        masks = random_masks(model)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        loss_of(compiled, dtype).backward()
        assert all(report.rewritten for report in backend.report().values()) and len(backend.report()) == 2
        found = block_gradients(model, masks)
        tokens = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        for name in names:
            exact, dense = (as_matrix(m.get_parameter(name).grad.double()) for m in (exact_model, dense_model))
            mask = masks[name]
            wanted = blocks_by_loops(exact, mask)
            budget = (blocks_by_loops(dense, mask) - wanted).abs().max()
            rounding = torch.finfo(torch.float32).eps * 2 * len(chosen) * exact.abs().max()
            # The values that the product reads are rounded in other places than those of the dense product.
            slack = 2 if dtype == torch.bfloat16 else 1
            assert (found[name] - wanted).abs().max() <= slack * budget + rounding, name
            per_expert = mask.shape[0] // EXPERTS // B
            for expert in (tokens == 0).nonzero().flatten():
                assert not found[name][mask.rows // per_expert == expert].any()
            assert found[name].any()


class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("architecture", MIXTURES)
    def test_every_product_is_sampled_and_training_follows_the_uncompiled_model(
        self, architecture: str, dtype: torch.dtype
    ) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture(architecture).to(dtype)
        masks = sylva_compile.trace_and_mask(model, method="random", block_size=B, sparsity=0.7)
        assert sum(name.endswith(STACKED) for name in masks) == 2
        model.requires_grad_(False)
        masks.embed()
        twin = copy.deepcopy(model)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        ids = torch.randint(3, VOCABULARY, (2, 12))
        for run in (compiled, twin):
            run(input_ids=ids, labels=ids).loss.backward()
        assert all(report.rewritten for report in backend.report().values())
        for name in masks:
            mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
            assert mine.any() or architecture == "llama4", name
            scale = theirs.abs().max()
            limit = 1e-4 if dtype == torch.float32 else 6e-2
            assert (mine - theirs).abs().max() <= limit * scale, name

    # Llama 4 computes its positions in complex numbers.
    @pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
    @pytest.mark.parametrize(
        ("architecture", "dtype"),
        [("qwen3-moe", torch.float32), ("qwen3-moe", torch.bfloat16), ("llama4", torch.float32)],
    )
    def test_inductor(self, architecture: str, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture(architecture).to(dtype)
        masks = random_masks(model.requires_grad_(False))
        masks.embed()
        twin = copy.deepcopy(model)
        backend = sylva_compile.backend(masks, on_miss="error")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        # The second length is compiled for any number of tokens.
        for length in (12, 7):
            model.zero_grad()
            twin.zero_grad()
            ids = torch.randint(3, VOCABULARY, (2, length))
            for run in (compiled, twin):
                run(input_ids=ids, labels=ids).loss.backward()
            assert all(report.rewritten for report in backend.report().values())
            for name in masks:
                mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
                limit = 1e-4 if dtype == torch.float32 else 6e-2
                assert (mine - theirs).abs().max() <= limit * theirs.abs().max()

    @pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
    def test_checkpointing_and_accumulation(self, architecture: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture(architecture)
        masks = random_masks(model.requires_grad_(False))
        masks.embed()
        twin = copy.deepcopy(model)
        model.activation_checkpointing_enable()
        compiled = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager"))
        for _ in range(2):
            ids = torch.randint(3, VOCABULARY, (2, 12))
            for run in (compiled, twin):
                run(input_ids=ids, labels=ids).loss.backward()
        for name in masks:
            mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)

    def test_autocast(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture("qwen3-moe")
        masks = random_masks(model.requires_grad_(False))
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        compiled = torch.compile(model, backend=backend)
        twin = copy.deepcopy(model)
        ids = torch.randint(3, VOCABULARY, (2, 12))
        with torch.autocast("cpu", torch.bfloat16):
            for run in (compiled, twin):
                run(input_ids=ids, labels=ids).loss.backward()
        assert all(report.rewritten for report in backend.report().values())
        for name in masks:
            mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
            assert (mine - theirs).abs().max() <= 6e-2 * theirs.abs().max()


def trained(model: nn.Module, masks: Masks, steps: int = 2, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or sylva_compile.AdamW(masks.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class TestValues:
    """Everything that writes or reads values sees `[E·m, n]`."""

    @pytest.fixture
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return tiny_mixture("gpt-oss").bfloat16().requires_grad_(False)

    @pytest.mark.parametrize("make", [sylva_compile.AdamW, torch.optim.AdamW, sylva_compile.optim.Muon])
    def test_optimizers_write_blocks_of_all_experts(self, model: nn.Module, make: type) -> None:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        masks = random_masks(model)
        trained(model, masks, optimizer=make(masks.parameters(), lr=1e-2))
        for name, mask in masks.items():
            weight = as_matrix(model.get_parameter(name).detach())
            changed = weight != as_matrix(before[name])
            assert changed.any() and not changed[~mask.dense()].any()
            blocks = model.get_parameter(name + "_blocks")
            inside = blocks_by_loops(weight, mask)
            assert torch.equal(inside, blocks.detach().to(inside.dtype).bfloat16().to(inside.dtype))

    def test_save_load_unload(self, model: nn.Module, tmp_path: Path) -> None:
        base = {name: value.clone() for name, value in model.state_dict().items()}
        fresh = copy.deepcopy(model)
        masks = random_masks(model)
        trained(model, masks)
        sylva_compile.save_adapter(model, tmp_path / "adapter")
        loaded = sylva_compile.load_adapter(fresh, tmp_path / "adapter")
        assert loaded == masks
        values = model.state_dict()
        assert values.keys() == base.keys()
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, values[name])
        sylva_compile.unload_adapter(fresh)
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, base[name])
        sylva_compile.merge_and_unload(model)
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"

    def test_resume(self, model: nn.Module, tmp_path: Path) -> None:
        masks = random_masks(model)
        fresh = copy.deepcopy(model)
        optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
        trained(model, masks, optimizer=optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        sylva_compile.save_adapter(model, tmp_path / "adapter")
        resumed = sylva_compile.load_adapter(fresh, tmp_path / "adapter")
        second = sylva_compile.AdamW(resumed.parameters(), lr=1e-2)
        second.load_state_dict(state)
        for each, own, stepped in ((model, masks, optimizer), (fresh, resumed, second)):
            torch.manual_seed(1)
            trained(each, own, optimizer=stepped)
        assert all(torch.equal(a, b) for a, b in zip(masks.parameters(), resumed.parameters(), strict=True))

    def test_a_masks_file(self, model: nn.Module, tmp_path: Path) -> None:
        masks = random_masks(model)
        masks.save(tmp_path / "masks.safetensors")
        assert Masks.load(tmp_path / "masks.safetensors") == masks

    def test_disable_adapter_and_changed_values(self, model: nn.Module) -> None:
        base = copy.deepcopy(model)
        masks = random_masks(model)
        trained(model, masks)
        with sylva_compile.disable_adapter(model):
            for name in masks:
                assert torch.equal(model.get_parameter(name), base.get_parameter(name))
        for name, indices, values in sylva_compile.changed_values(model):
            base.get_parameter(name).flatten()[indices.long()] = values
            assert torch.equal(base.get_parameter(name), model.get_parameter(name))

    @pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
    @pytest.mark.parametrize("choose", ["random", "gradient"])
    def test_blocks_move_and_compiled_graphs_stay(self, architecture: str, choose: str) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture(architecture).requires_grad_(False)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        masks = random_masks(model)
        optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
        schedule = sylva_compile.schedules.MovingBlocks(masks, every=1, choose=choose, seed=0)
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="error")
        compiled = torch.compile(model, backend=backend)
        before = {name: mask.positions for name, mask in masks.items()}
        for _ in range(3):
            ids = torch.randint(3, VOCABULARY, (2, 12))
            compiled(input_ids=ids, labels=ids).loss.backward()
            twin = copy.deepcopy(model)
            twin.zero_grad()
            twin(input_ids=ids, labels=ids).loss.backward()
            for name in masks:
                mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert all(not torch.equal(masks[name].positions, before[name]) for name in masks)
        sylva_compile.unload_adapter(model)
        assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())

    def test_shira_is_refused(self, model: nn.Module, tmp_path: Path) -> None:
        masks = random_masks(model)
        trained(model, masks)
        with pytest.raises(AdapterError, match="merge it instead"):
            export_peft(model, tmp_path / "shira")


class TestScope:
    def test_all_linear_covers_experts_and_no_router(self, caplog: pytest.LogCaptureFixture) -> None:
        model = tiny_mixture("qwen3-moe")
        with caplog.at_level("INFO", logger="sylva_compile"):
            masks = sylva_compile.trace_and_mask(model, method="random", block_size=B)
        stacked = [name for name in masks if name.endswith(STACKED)]
        assert stacked == [f"model.layers.0.mlp.experts.{name}" for name in STACKED]
        assert masks[stacked[0]].shape == (EXPERTS * 96, 32)
        assert not any("gate.weight" in name for name in masks)
        inside = sum(model.get_parameter(name).numel() for name in masks)
        share = inside / sum(p.numel() for p in model.parameters())
        assert f"{100 * share:.1f}% of the model's" in caplog.text

    @pytest.mark.parametrize(
        "scope", [["experts"], list(STACKED), r".*\.experts", r".*experts\.(gate_up|down)_proj"], ids=str
    )
    def test_names(self, scope: object) -> None:
        masks = sylva_compile.trace_and_mask(tiny_mixture("mixtral"), method="random", block_size=B, scope=scope)
        assert [name.rpartition(".")[2] for name in masks] == list(STACKED)

    @pytest.mark.parametrize("method", ["magnitude", "lift", "random"])
    def test_methods_without_data(self, method: str) -> None:
        model = tiny_mixture("mixtral")
        masks = sylva_compile.trace_and_mask(model, method=method, block_size=B, sparsity=0.5, scope=["experts"])
        assert all(mask.nnz == mask.block_map().numel() // 2 for mask in masks.values())

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
    def test_other_implementations_are_refused(self, implementation: str) -> None:
        model = tiny_mixture("mixtral", implementation=implementation)
        with pytest.raises(ScopeError, match=r"set_experts_implementation\('grouped_mm'\)"):
            sylva_compile.trace_and_mask(model, method="random", block_size=B)
        masks = sylva_compile.trace_and_mask(model, method="random", block_size=B, scope=["q_proj"])
        assert len(masks) == 1

    @pytest.mark.parametrize("name", ["JetMoeParallelExperts", "DbrxExpertGLU"])
    def test_own_classes_are_refused(self, name: str) -> None:
        model = nn.ModuleDict({"lin": nn.Linear(8, 8), "experts": type(name, (nn.Module,), {})()})
        model["experts"].weight = nn.Parameter(torch.zeros(2, 8, 8))
        with pytest.raises(ScopeError, match="name the layers to train"):
            sylva_compile.trace_and_mask(model, method="random", block_size=B)

    def test_expert_parallel_is_refused(self) -> None:
        model = tiny_mixture("mixtral")
        for module in experts_of(model).values():
            module._is_expert_parallel = True
        with pytest.raises(ScopeError, match="expert parallelism"):
            sylva_compile.trace_and_mask(model, method="random", block_size=B)

    def test_blocks_that_cross_experts_are_refused(self) -> None:
        model = tiny_mixture("mixtral")
        with pytest.raises(ArgumentError, match="use a divisor of"):
            sylva_compile.trace_and_mask(model, method="random", block_size=24, scope=["down_proj"])

    def test_other_parameters_of_three_dimensions_are_refused(self) -> None:
        model = nn.Conv1d(8, 8, 3)
        with pytest.raises(ScopeError, match="stacked experts of transformers"):
            Masks.from_block_maps(model, {"weight": torch.ones(8, 1, dtype=torch.bool)}, 8)

    def test_experts_in_pieces_are_refused(self) -> None:
        model = tiny_mixture("mixtral")
        (experts,) = experts_of(model).values()
        experts.down_proj = nn.Parameter(experts.down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2))
        with pytest.raises(ScopeError, match="in one piece"):
            sylva_compile.trace_and_mask(model, method="random", block_size=B)

    def test_pruning_leaves_experts_alone(self) -> None:
        masks = sylva_compile.prune_masks(tiny_mixture("mixtral"), n=2, m=4, double=False)
        assert masks and not any("experts" in name for name in masks)

    def test_an_implementation_that_is_set_later_is_still_right(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = tiny_mixture("mixtral").requires_grad_(False)
        masks = random_masks(model)
        masks.embed()
        backend = sylva_compile.backend(masks, inner="aot_eager", on_miss="ignore")
        model.set_experts_implementation("batched_mm")
        twin = copy.deepcopy(model)
        compiled = torch.compile(model, backend=backend)
        ids = torch.randint(3, VOCABULARY, (2, 12))
        for run in (compiled, twin):
            run(input_ids=ids, labels=ids).loss.backward()
        for name in masks:
            mine, theirs = (m.get_parameter(name + "_blocks").grad for m in (model, twin))
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
        assert not any(report.rewritten for report in backend.report().values())


def test_a_weight_of_another_shape_is_refused() -> None:
    model = tiny_mixture("mixtral").requires_grad_(False)
    masks = random_masks(model)
    masks.embed()
    (experts,) = experts_of(model).values()
    with pytest.raises(EmbedError, match="takes a Parameter of shape"):
        experts.down_proj = nn.Parameter(as_matrix(experts._parameters["down_proj"].detach()).clone())
