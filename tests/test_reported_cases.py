"""Cases from public bug reports about sparse and low-rank fine-tuning, each tested in all its variants."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.fx.experimental.proxy_tensor
from oracle import assert_invariant, random_masks
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import MixtralConfig, MixtralForCausalLM

import sylva_compile
from sylva_compile import Masks
from sylva_compile.errors import EmbedError, ScopeError, TraceError

NAMES = ["0.weight", "2.weight"]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))


def mean_square(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


class TestInferenceMode:
    """Without a check, torch raises "Inference tensors do not track version counter"."""

    def test_embedding_is_refused_and_the_model_is_as_before(self) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.5)
        with torch.inference_mode():
            for embed in (masks.embed, masks.parameters, lambda: sylva_compile.backend(masks)):
                with pytest.raises(EmbedError, match=r"inference_mode\(\).*outside of it") as caught:
                    embed()
                assert "\n" not in str(caught.value)
        assert type(model[0]) is nn.Linear
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        masks.embed()

    def test_loading_an_adapter_is_refused(self, tmp_path: Path) -> None:
        model = small()
        base = copy.deepcopy(model)
        random_masks(model, NAMES, 16, 0.5).embed()
        sylva_compile.save_adapter(model, tmp_path)
        with torch.inference_mode(), pytest.raises(EmbedError, match="inference_mode"):
            sylva_compile.load_adapter(base, tmp_path)
        assert type(base[0]) is nn.Linear
        sylva_compile.load_adapter(base, tmp_path)

    def test_weights_that_were_made_there_are_refused(self) -> None:
        with torch.inference_mode():
            model = small()
        with pytest.raises(ScopeError, match=r"0\.weight was made under torch\.inference_mode"):
            sylva_compile.trace_and_mask(model, method="random", block_size=8)
        with pytest.raises(ScopeError, match="load the model outside of it"):
            Masks.from_block_maps(model, {"0.weight": torch.ones(7, 5)}, 8)
        with pytest.raises(ScopeError, match="inference_mode"):
            random_masks(small(), NAMES, 16, 0.5).embed(model)

    def test_tracing_is_refused(self) -> None:
        model = small()
        with torch.inference_mode(), pytest.raises(TraceError, match=r"inference_mode\(\).*outside of it"):
            sylva_compile.trace_and_mask(model, [torch.randn(2, 40)], block_size=8, loss_fn=mean_square)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_embedded_model_is_evaluated_with_its_newest_values(self, compiled: bool) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.5)
        call: Any = torch.compile(model, backend=sylva_compile.backend(masks, inner="aot_eager")) if compiled else model
        x = torch.randn(3, 40)
        mean_square(call, x).backward()
        torch.optim.SGD(masks.parameters(), lr=1.0).step()
        with torch.no_grad():
            masks.parameters()[0].mul_(2.0)
        with torch.inference_mode():
            found = call(x)
        assert_invariant(model, masks)
        assert torch.equal(found, sylva_compile.merge_and_unload(copy.deepcopy(model))(x))
        mean_square(call, x).backward()


class TestFreezing:
    """Inductor's freezing makes weights constants; an evaluation after a step returned the values from before it."""

    @pytest.mark.parametrize("how", ["config", "options"])
    def test_an_evaluation_after_a_change_returns_the_new_values(self, how: str) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.5)
        options = {"freezing": True} if how == "options" else None
        x = torch.randn(6, 40)

        def check() -> None:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), model(x))

        with inductor_config.patch(freezing=how == "config"):
            compiled = torch.compile(model, backend=sylva_compile.backend(masks), options=options)
            check()
            mean_square(compiled, x).backward()
            torch.optim.SGD(masks.parameters(), lr=1.0).step()
            check()
            with torch.no_grad():
                masks.parameters()[0].mul_(3.0)
                found = compiled(x)
                torch.testing.assert_close(found, model(x))
                model[2]._parameters["weight"].mul_(2.0)
                found = compiled(x)
                torch.testing.assert_close(found, model(x))

    def test_stays_on_for_graphs_without_blocks(self) -> None:
        model = small().requires_grad_(False)
        x = torch.randn(6, 40)
        with inductor_config.patch(freezing=True), torch.no_grad():
            compiled = torch.compile(model, backend=sylva_compile.backend())
            before = compiled(x).clone()
            model[0].weight.zero_()
            # Freezing made the weight a constant, as it should.
            assert torch.equal(compiled(x), before)


class TestExperts:
    """A mixture of experts keeps most of its elements in parameters of three dimensions."""

    def test_the_share_that_is_left_out_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        config = MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            vocab_size=64,
        )
        model = MixtralForCausalLM(config)
        sylva_compile.trace_and_mask(model, method="random", block_size=8, scope=["q_proj", "v_proj"])
        (record,) = (record for record in caplog.records if "Left out" in record.message)
        assert record.levelno == logging.WARNING
        experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        share = experts / sum(p.numel() for p in model.parameters())
        assert f"{share:.1%} in parameters of three or more dimensions, such as experts" in record.message
        assert "experts." in record.message

    def test_an_ordinary_model_gets_no_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sylva_compile"):
            sylva_compile.trace_and_mask(tiny("llama").model, method="random", block_size=8)
        (record,) = (record for record in caplog.records if "Left out" in record.message)
        assert record.levelno == logging.INFO
        assert "in token embeddings (model.embed_tokens.weight first)" in record.message
        assert "in the output head (lm_head.weight first)" in record.message

    def test_a_narrower_scope_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="sylva_compile"):
            sylva_compile.trace_and_mask(tiny("llama").model, method="random", block_size=8, scope=["q_proj"])
        assert "in linear layers that the scope does not name" in caplog.text


class Float8Linear(nn.Linear):
    """A conversion like those of torchao: a module of another class that takes over the weight."""

    @classmethod
    def of(cls, module: nn.Module) -> "Float8Linear":
        made = cls(*reversed(module.weight.shape), bias=False, device="meta")
        made.weight = module.weight  # type: ignore[assignment]
        return made


class TestConversions:
    """Without a check, torch raises "Cannot assign non-leaf Tensor to parameter 'weight'"."""

    def test_after_embedding_say_to_convert_before(self) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.5)
        masks.embed()
        for take in (
            lambda: Float8Linear.of(model[0]),
            lambda: nn.Bilinear(4, 4, 4).register_parameter("w", model[0].weight),
        ):
            for grad in (torch.enable_grad, torch.no_grad):
                with grad(), pytest.raises(EmbedError, match=r"0\.weight carries blocks.*convert the model.*before"):
                    take()
        assert_invariant(model, masks)

    def test_lists_of_parameters_may_hold_the_weight(self) -> None:
        model = small()
        masks = random_masks(model, NAMES, 16, 0.5)
        masks.embed()
        held = nn.ParameterList(model.parameters())
        assert any(parameter is model[0]._parameters["weight"] for parameter in held)
        assert_invariant(model, masks)

    @pytest.mark.parametrize("how", ["export", "symbolic_trace", "make_fx"])
    def test_graphs_of_an_embedded_model_keep_its_weights_in_modules(self, how: str) -> None:
        model = small()
        random_masks(model, NAMES, 16, 0.5).embed()
        x = torch.randn(3, 40)
        with torch.no_grad():
            expected = model(x)
            if how == "export":
                graph: Any = torch.export.export(model, (x,)).module()
            elif how == "symbolic_trace":
                graph = torch.fx.symbolic_trace(model)
            else:
                graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
            torch.testing.assert_close(graph(x), expected)

    def test_before_embedding_work(self) -> None:
        model = nn.Sequential(Float8Linear.of(nn.Linear(16, 16)), nn.GELU())
        masks = random_masks(model, ["0.weight"], 8, 0.5)
        masks.embed()
        mean_square(model, torch.randn(2, 16)).backward()
        assert masks.parameters()[0].grad is not None

    def test_autograd_reads_the_node_of_a_weight_as_ever(self) -> None:
        model = small()
        random_masks(model, NAMES, 16, 0.5).embed()
        weight = model[0].weight
        assert weight.grad_fn is not None
        assert not weight.is_leaf
        assert weight.detach().grad_fn is None


class TestGenerate:
    def test_runs_uncompiled_under_a_stance_and_training_goes_on(self) -> None:
        """Generate as docs/recipes.md recommends; without it, Dynamo compiles further graphs for the cache."""
        case = tiny("llama")
        masks = sylva_compile.trace_and_mask(case.model, method="random", block_size=8, sparsity=0.5)
        case.model.compile(backend=sylva_compile.backend(masks, inner="aot_eager"))
        case.model(**case.batch).loss.backward()
        counters.clear()
        prompt = case.batch["input_ids"][:1, :4]
        with torch.compiler.set_stance("force_eager"):
            found = case.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert found.shape == (1, 16)
        assert not counters["frames"]
        assert torch.equal(found[0, :4], prompt[0])
        case.model(**case.batch).loss.backward()
