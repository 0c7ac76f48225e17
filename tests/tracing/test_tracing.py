"""Stage 1: a trace observes the gradients that autograd computes, and leaves the model as it found it."""

import copy
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import two_ranks
from tiny_models import ARCHITECTURES, tiny
from torch import Tensor, nn
from trace_two_ranks import METHODS, model_and_data

import sylva_compile
from sylva_compile import Masks
from sylva_compile._torch import compiled_call
from sylva_compile.curvature.kfac import Kfac
from sylva_compile.errors import ArgumentError, EmbedError, ScopeError, TraceError
from sylva_compile.tracing import capture

OPTIONS: dict[str, Any] = {"block_size": 8, "sparsity": 0.7, "progress": False}


def regression(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 30))


def batches(count: int = 4, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 40), torch.randn(size, 30)) for _ in range(count)]


class TestWhatIsSeen:
    def test_operands_multiply_to_the_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data = small(), batches(1)
        seen: dict[tuple[int, int], Tensor] = {}
        update = Kfac.update

        def record(self: Kfac, inputs: Tensor, gradients: Tensor, offsets: Tensor | None) -> None:
            seen[tuple(self.gradient.shape)] = gradients.t() @ inputs
            update(self, inputs, gradients, offsets)

        monkeypatch.setattr(Kfac, "update", record)
        sylva_compile.trace_and_mask(model, data, method="kfac", loss_fn=regression, **OPTIONS)
        regression(model, data[0]).backward()
        for layer in (model[0], model[2]):
            # A trace sums over the 8 sequences, and the loss is their mean.
            torch.testing.assert_close(seen[tuple(layer.weight.shape)], 8 * layer.weight.grad)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_every_weight_in_scope_of_real_architectures(self, architecture: str) -> None:
        case = tiny(architecture)
        masks = sylva_compile.trace_and_mask(case.model, [case.batch] * 2, num_samples=8, **OPTIONS)
        every = sylva_compile.trace_and_mask(case.model, method="random", **OPTIONS)
        assert list(masks) == list(every)

    def test_layers_share_one_graph_however_deep_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs: list[int] = []
        compile_eagerly = capture.compile_eagerly

        def count(*args: Any) -> Any:
            graphs.append(1)
            return compile_eagerly(*args)

        monkeypatch.setattr(capture, "compile_eagerly", count)
        case = tiny("llama", layers=6)
        masks = sylva_compile.trace_and_mask(case.model, [case.batch] * 2, num_samples=8, **OPTIONS)
        assert len(masks) == 6 * 7
        # The input of the first layer has no gradient, so that layer has a graph of its own.
        assert len(graphs) == 2
        assert not any(compiled_call(module) for module in case.model.modules())

    @pytest.mark.parametrize("architecture", ["llama", "t5", "roberta"])
    def test_statistics_are_those_of_the_model_compiled_whole(
        self, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = tiny(architecture)
        options = {"num_samples": 8, "method": "kfac", "score": "gain", **OPTIONS}
        found = sylva_compile.trace_and_mask(case.model, [case.batch] * 2, **options)
        monkeypatch.setattr(capture, "compile_units", lambda model, weights: None)
        whole = sylva_compile.trace_and_mask(case.model, [case.batch] * 2, **options)
        assert dict(found) == dict(whole)

    def test_layers_whose_parts_the_model_calls_itself(self) -> None:
        """Nobody calls these layers, so the model is compiled whole."""

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                raise AssertionError("the model calls the parts")

        class Parts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(Layer() for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = x + layer.second(layer.first(x).relu())
                return x

        model = Parts()
        data = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(2)]
        options = {"method": "fisher", "loss_fn": regression, "num_samples": 16, **OPTIONS}
        masks = sylva_compile.trace_and_mask(model, data, **options)
        assert len(masks) == 6
        for name, mask in masks.items():
            total = torch.zeros(16, 16)
            for batch in data:
                (gradient,) = torch.autograd.grad(regression(model, batch), [model.get_parameter(name)])
                total += gradient.square()
            scores = total.view(2, 8, 2, 8).sum((1, 3)).flatten()
            assert set(scores.topk(mask.nnz).indices.tolist()) == set(
                mask.block_map().flatten().nonzero().flatten().tolist()
            )

    def test_conv1d_masks_are_in_the_stored_orientation(self) -> None:
        case = tiny("gpt2")
        twin = copy.deepcopy(case.model)
        linear = nn.Linear(32, 128, bias=False)
        name = "transformer.h.0.mlp.c_fc"
        source = twin.get_submodule(name)
        linear.weight = nn.Parameter(source.weight.detach().t().contiguous())
        linear.bias = source.bias
        twin.get_submodule("transformer.h.0.mlp").c_fc = linear
        found = [
            sylva_compile.trace_and_mask(model, [case.batch], scope=["c_fc"], num_samples=4, **OPTIONS)[
                name + ".weight"
            ]
            for model in (case.model, twin)
        ]
        assert found[0].shape == (32, 128)
        assert torch.equal(found[0].block_map(), found[1].block_map().t())

    def test_layers_that_share_code_do_not_share_statistics(self) -> None:
        """Code after graph breaks is compiled once and runs for every layer; each must feed its own estimator."""

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                torch._dynamo.graph_break()
                return x + self.lin(x).tanh()

        model = nn.Sequential(Block(), Block(), Block())
        data = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(2)]
        masks = sylva_compile.trace_and_mask(model, data, method="fisher", loss_fn=regression, **OPTIONS)
        for name, mask in masks.items():
            total = torch.zeros(16, 16)
            for batch in data:
                (gradient,) = torch.autograd.grad(regression(model, batch), [model.get_parameter(name)])
                total += gradient.square()
            scores = total.view(2, 8, 2, 8).sum((1, 3))
            best = torch.zeros(4, dtype=torch.bool).index_fill_(0, scores.flatten().topk(mask.nnz).indices, True)
            assert torch.equal(mask.block_map().flatten(), best), name

    def test_padding_does_not_change_the_masks(self) -> None:
        case = tiny("llama")
        padded = {
            "input_ids": torch.cat([case.batch["input_ids"], torch.full((4, 6), 5)], 1),
            "labels": torch.cat([case.batch["labels"], torch.full((4, 6), -100)], 1),
            "attention_mask": torch.cat([torch.ones(4, 10), torch.zeros(4, 6)], 1).long(),
        }
        for method, score in (("kfac", "gain"), ("kfac", "paper"), ("kfac", "greedy"), ("sylva", "gain")):
            masks = [
                sylva_compile.trace_and_mask(case.model, [b], method=method, score=score, num_samples=4, **OPTIONS)
                for b in (case.batch, padded)
            ]
            assert dict(masks[0]) == dict(masks[1])

    def test_the_scale_of_the_loss_does_not_change_the_masks(self) -> None:
        model, data = small(), batches()
        first = sylva_compile.trace_and_mask(model, data, loss_fn=regression, **OPTIONS)
        second = sylva_compile.trace_and_mask(model, data, loss_fn=lambda m, b: 64 * regression(m, b), **OPTIONS)
        assert dict(first) == dict(second)

    def test_sylva_gain_equals_exact_kfac_gain(self) -> None:
        model, data = small(), batches()
        first = sylva_compile.trace_and_mask(model, data, loss_fn=regression, method="sylva", score="gain", **OPTIONS)
        second = sylva_compile.trace_and_mask(model, data, loss_fn=regression, method="kfac", score="gain", **OPTIONS)
        assert dict(first) == dict(second)

    def test_a_weight_that_the_loss_does_not_reach_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        class Spare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.spare = nn.Linear(40, 30), nn.Linear(40, 30)

            def forward(self, x: Tensor) -> Tensor:
                return self.used(x)

        masks = sylva_compile.trace_and_mask(Spare(), batches(), loss_fn=regression, **OPTIONS)
        assert list(masks) == ["used.weight"]
        assert "spare.weight gets no mask" in caplog.text

    def test_a_weight_whose_gradient_is_zero_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 30))
        nn.init.zeros_(model[1].weight)
        masks = sylva_compile.trace_and_mask(model, batches(), loss_fn=regression, **OPTIONS)
        assert list(masks) == ["1.weight"]
        assert "0.weight gets no mask: its gradient is zero" in caplog.text

    def test_layers_after_a_graph_break_do_not_hide_those_before(self) -> None:
        """An activation that enters a graph as a matrix looks like a weight, and its gradient like a weight's."""
        torch.manual_seed(0)
        layers, data = small(), batches()
        whole = sylva_compile.trace_and_mask(layers, data, loss_fn=regression, **OPTIONS)

        class Broken(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                x = self[1](self[0](x))
                torch._dynamo.graph_break()
                return self[2](x)

        masks = sylva_compile.trace_and_mask(Broken(*layers), data, loss_fn=regression, **OPTIONS)
        assert dict(masks) == dict(whole)

    def test_a_parameter_that_the_model_does_not_list(self) -> None:
        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.listed, self.rest = nn.Linear(40, 40), [nn.Linear(40, 30)]

            def forward(self, x: Tensor) -> Tensor:
                return self.rest[0](self.listed(x))

        masks = sylva_compile.trace_and_mask(Hidden(), batches(), loss_fn=regression, **OPTIONS)
        assert list(masks) == ["listed.weight"]

    def test_a_weight_that_is_seen_in_part_gets_no_mask(self, caplog: pytest.LogCaptureFixture) -> None:
        class Partly(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.twice, self.once = nn.Linear(40, 40), nn.Linear(40, 30)

            @torch.compiler.disable
            def uncompiled(self, x: Tensor) -> Tensor:
                return self.twice(x)

            def forward(self, x: Tensor) -> Tensor:
                return self.once(self.uncompiled(self.twice(x).tanh()))

        masks = sylva_compile.trace_and_mask(Partly(), batches(), loss_fn=regression, **OPTIONS)
        assert list(masks) == ["once.weight"]
        assert "twice.weight gets no mask: it is used outside" in caplog.text

    def test_half_precision_gradients_whose_sum_would_overflow(self) -> None:
        data = [(x.half(), y.half()) for x, y in batches(1, 64)]
        masks = sylva_compile.trace_and_mask(
            small().half(), data, loss_fn=lambda m, b: (m(b[0]).float() - b[1]).mean() * 2e4, **OPTIONS
        )
        assert len(masks) == 2

    def test_changing_lengths(self) -> None:
        case = tiny("llama")
        data = [{key: value[:, :length] for key, value in case.batch.items()} for length in (10, 7, 5, 9)]
        masks = sylva_compile.trace_and_mask(case.model, data, num_samples=16, **OPTIONS)
        assert len(masks) == 14


class TestLeftAsFound:
    def test_mode_flags_gradients_hooks_random_state_and_values(self) -> None:
        case = tiny("gpt2")
        model = case.model
        model.transformer.h[0].eval()
        model.transformer.wte.requires_grad_(False)
        model(**case.batch).loss.backward()
        modes = [module.training for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        values = [parameter.detach().clone() for parameter in model.parameters()]
        state, cache = torch.random.get_rng_state(), model.config.use_cache
        loader = torch.utils.data.DataLoader(
            [{k: v[i] for k, v in case.batch.items()} for i in range(4)], 2, shuffle=True
        )
        sylva_compile.trace_and_mask(model, loader, num_samples=4, **OPTIONS)
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
            assert torch.equal(parameter, value)
            assert (parameter.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.config.use_cache == cache
        assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
        assert type(model.lm_head) is nn.Linear

    def test_a_model_that_was_compiled_in_place(self) -> None:
        case = tiny("llama")
        case.model.compile(backend="eager")
        call = case.model._compiled_call_impl
        assert len(sylva_compile.trace_and_mask(case.model, [case.batch], num_samples=4, **OPTIONS)) == 14
        assert case.model._compiled_call_impl is call

    def test_an_error_in_the_middle_leaves_it_too(self) -> None:
        model = small().train()
        model[2].weight.requires_grad_(False)

        def breaks(m: nn.Module, batch: Any) -> Tensor:
            raise RuntimeError("out of luck")

        with pytest.raises(RuntimeError, match="out of luck"):
            sylva_compile.trace_and_mask(model, batches(), loss_fn=breaks, **OPTIONS)
        assert model.training
        assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]

    def test_layers_that_merge_their_weights_when_evaluated(self) -> None:
        class Merging(nn.Linear):
            def train(self, mode: bool = True) -> "Merging":
                with torch.no_grad():
                    self.weight.add_(0.1 if not mode else -0.1)
                return super().train(mode)

        model = nn.Sequential(Merging(40, 50), nn.Linear(50, 30))
        before = model[0].weight.detach().clone()
        sylva_compile.trace_and_mask(model, batches(), loss_fn=regression, scope=["1"], **OPTIONS)
        assert torch.equal(model[0].weight, before)

    def test_compilations_of_the_trace_do_not_stay(self) -> None:
        model, data = small(), batches()
        for _ in range(12):
            sylva_compile.trace_and_mask(model, data, loss_fn=regression, **OPTIONS)
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            torch.compile(model, backend="eager")(data[0][0])


class TestMethods:
    @pytest.mark.parametrize("method", ["magnitude", "lift", "random"])
    def test_no_loader_needed(self, method: str) -> None:
        masks = sylva_compile.trace_and_mask(small(), method=method, **OPTIONS)
        assert [mask.nnz for mask in masks.values()] == [11, 8]

    def test_random_follows_the_seed_and_leaves_it(self) -> None:
        model = small()
        torch.manual_seed(3)
        first = sylva_compile.trace_and_mask(model, method="random", **OPTIONS)
        again = sylva_compile.trace_and_mask(model, method="random", **OPTIONS)
        torch.manual_seed(4)
        other = sylva_compile.trace_and_mask(model, method="random", **OPTIONS)
        assert dict(first) == dict(again) != dict(other)

    def test_magnitude_takes_the_largest(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16))
        with torch.no_grad():
            model[0].weight[8:, :8] += 10
        masks = sylva_compile.trace_and_mask(model, method="magnitude", sparsity=0.75, block_size=8)
        assert (masks["0.weight"].rows.tolist(), masks["0.weight"].cols.tolist()) == ([1], [0])

    def test_the_planted_block_is_found(self) -> None:
        """Targets differ from the model in one block of one weight: every method with data must choose this block."""
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            teacher[0].weight[16:32, 48:64] += torch.randn(16, 16)
            data = [(x, teacher(x)) for x in (torch.randn(64, 64) for _ in range(4))]
        for method, score in (
            ("sylva", "greedy"),
            ("sylva", "gain"),
            ("kfac", "greedy"),
            ("kfac", "gain"),
            ("kfac", "paper"),
            ("fisher", "gain"),
        ):
            masks = sylva_compile.trace_and_mask(
                model,
                data,
                method=method,
                score=score,
                sparsity=0.95,
                block_size=16,
                loss_fn=regression,
                progress=False,
            )
            mask = masks["0.weight"]
            assert (mask.rows.tolist(), mask.cols.tolist()) == ([1], [3]), (method, score)

    def test_global_allocation_spends_one_budget(self) -> None:
        model, data = small(), batches()
        masks = sylva_compile.trace_and_mask(model, data, loss_fn=regression, allocation="global", **OPTIONS)
        assert sum(mask.nnz for mask in masks.values()) == 19

    def test_column_budget_limits_the_inputs(self) -> None:
        case = tiny("gpt2")
        masks = sylva_compile.trace_and_mask(case.model, [case.batch], num_samples=4, column_budget=0.5, **OPTIONS)
        for mask in masks.values():
            # Conv1D stores inputs along rows.
            assert len(mask.rows.unique()) <= mask.shape[0] // 8 // 2


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"sparsity": 1.0}, "0.98 to train 2%"),
            ({"sparsity": -0.1}, r"in \[0, 1\)"),
            ({"block_size": 4}, "8 or more"),
            ({"block_size": 64}, "larger than every dimension"),
            ({"method": "magic"}, "use one of sylva"),
            ({"score": "best"}, "'greedy', 'gain' or 'paper'"),
            ({"allocation": "equal"}, "'layer' or 'global'"),
            ({"column_budget": 0.0}, "column_budget"),
            ({"num_samples": 0}, "num_samples"),
            ({"num_samples": "8"}, "num_samples"),
            ({"num_samples": 2.5}, "num_samples"),
            ({"damping": -1.0}, "damping"),
            ({"damping": float("inf")}, "damping"),
            ({"rank": -1}, "rank=-1"),
            ({"rank": 2.5}, "rank=2.5"),
            ({"num_partitions": -1}, "num_partitions=-1"),
            ({"num_partitions": 64}, "64 is a depth"),
            ({"gradient_device": "nowhere"}, "gradient_device"),
            ({"gradient_device": "meta"}, "gradient_device"),
        ],
    )
    def test_out_of_range(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ArgumentError, match=match) as caught:
            sylva_compile.trace_and_mask(small(), batches(), loss_fn=regression, **{**OPTIONS, **options})
        assert "\n" not in str(caught.value)

    def test_a_batch_in_place_of_a_loader(self) -> None:
        with pytest.raises(ArgumentError, match=r"such as \[batch\]"):
            sylva_compile.trace_and_mask(small(), {"x": torch.ones(8, 40)}, loss_fn=regression, **OPTIONS)

    def test_no_loader(self) -> None:
        with pytest.raises(ArgumentError, match="needs a loader"):
            sylva_compile.trace_and_mask(small(), loss_fn=regression, **OPTIONS)

    @pytest.mark.parametrize("scope", ["q_proj", ["q_proj"], "(", []])
    def test_scope_that_matches_nothing(self, scope: Any) -> None:
        with pytest.raises(ScopeError, match="'all-linear'"):
            sylva_compile.trace_and_mask(small(), method="random", scope=scope, **OPTIONS)

    def test_an_ending_that_was_written_as_an_expression(self) -> None:
        model = nn.ModuleDict({"block": small()})
        with pytest.raises(ScopeError, match=r"so use \['2'\] for names that end so"):
            sylva_compile.trace_and_mask(model, method="random", scope="2", **OPTIONS)

    def test_an_ending_that_matches_nothing_beside_others(self, caplog: pytest.LogCaptureFixture) -> None:
        assert len(sylva_compile.trace_and_mask(small(), method="random", scope=["0", "queery"], **OPTIONS)) == 1
        assert "no Linear or Conv1D has a name that ends in ['queery']" in caplog.text

    def test_a_model_without_linear_layers(self) -> None:
        with pytest.raises(ScopeError, match="the model has none"):
            sylva_compile.trace_and_mask(nn.Conv2d(8, 8, 3), method="random", **OPTIONS)

    def test_all_linear_leaves_lora_out(self) -> None:
        model = peft.get_peft_model(tiny("llama").model, peft.LoraConfig(r=8, target_modules=["q_proj"]))
        masks = sylva_compile.trace_and_mask(model, method="random", **OPTIONS)
        assert len(masks) == 14
        assert not any("lora" in name for name in masks)

    def test_more_than_asked_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        sylva_compile.trace_and_mask(small(), method="random", block_size=32, sparsity=0.98, progress=False)
        assert "% of the elements are trained where sparsity=0.98 asks for 2.0%" in caplog.text

    def test_scopes(self) -> None:
        model = tiny("llama").model
        trace = sylva_compile.trace_and_mask
        every = trace(model, method="random", **OPTIONS)
        assert len(every) == 14
        assert "lm_head.weight" not in every
        assert list(trace(model, method="random", scope=r".*layers\.1\..*q_proj", **OPTIONS)) == [
            "model.layers.1.self_attn.q_proj.weight"
        ]
        assert len(trace(model, method="random", scope=["q_proj", "mlp.up_proj"], **OPTIONS)) == 4

    @pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForTokenClassification"])
    def test_all_linear_leaves_the_classifier_out(self, kind: str) -> None:
        family = kind.partition("For")[0]
        config = getattr(transformers, f"{family}Config")(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        masks = sylva_compile.trace_and_mask(getattr(transformers, kind)(config), method="random", **OPTIONS)
        assert len(masks) >= 6
        assert not any("classifier" in name for name in masks)

    def test_a_column_budget_without_room_is_refused_before_the_trace(self) -> None:
        def not_asked() -> Any:
            raise AssertionError("the loader was asked")
            yield

        with pytest.raises(ArgumentError, match="leaves room for"):
            sylva_compile.trace_and_mask(
                small(), not_asked(), loss_fn=regression, **OPTIONS | {"sparsity": 0.25, "column_budget": 0.5}
            )

    def test_an_embedded_model(self) -> None:
        model = small()
        sylva_compile.trace_and_mask(model, method="random", **OPTIONS).embed()
        with pytest.raises(EmbedError, match="unload_adapter"):
            sylva_compile.trace_and_mask(model, method="random", **OPTIONS)


class TestBadData:
    def trace(self, model: nn.Module, data: Any, loss_fn: Any = regression) -> None:
        flags = [p.requires_grad for p in model.parameters()]
        with_line = pytest.raises(TraceError)
        with with_line as caught:
            sylva_compile.trace_and_mask(model, data, loss_fn=loss_fn, **OPTIONS)
        self.message = str(caught.value)
        assert "\n" not in self.message
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_empty_loader(self) -> None:
        self.trace(small(), [])
        assert "no batches" in self.message

    def test_batches_without_labels(self) -> None:
        case = tiny("llama")
        self.trace(case.model, [{"input_ids": case.batch["input_ids"]}], None)
        assert "put labels into the batches" in self.message

    def test_batches_that_are_no_mapping(self) -> None:
        self.trace(small(), batches(), None)
        assert "loss_fn" in self.message

    def test_a_loss_that_is_no_scalar(self) -> None:
        self.trace(small(), batches(), lambda m, b: m(b[0]))
        assert "(8, 30)" in self.message

    def test_a_loss_without_gradient(self) -> None:
        self.trace(small(), batches(), lambda m, b: regression(m, b).detach())
        assert "0.weight" in self.message

    def test_a_loss_that_is_nan_names_the_first_layer(self) -> None:
        model = small()
        with torch.no_grad():
            model[2].bias[3] = torch.nan
        self.trace(model, batches())
        assert "leave layer 2" in self.message

    def test_a_loss_that_is_nan_in_a_layer_of_many(self, caplog: pytest.LogCaptureFixture) -> None:
        case = tiny("llama")
        with torch.no_grad():
            case.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
        self.trace(case.model, [case.batch], None)
        assert "leave layer model.layers.1.mlp.up_proj" in self.message
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_loss_without_any_gradient(self) -> None:
        self.trace(small(), batches(), lambda m, b: regression(m, b) * 0)
        assert "a gradient of zero" in self.message

    def test_a_loss_that_takes_its_targets_out_of_the_batch(self) -> None:
        data = [{"inputs": torch.randn(8, 40), "targets": torch.full((8, 30), torch.nan)}]
        self.trace(small(), data, lambda m, b: (m(b["inputs"]) - b.pop("targets")).square().mean())
        assert "leave the loss function" in self.message
        assert "targets" in data[0]

    def test_gradients_that_are_not_finite(self) -> None:
        self.trace(small(), batches(), lambda m, b: (m(b[0]).square().sum() * 0).sqrt())
        assert "output gradient of 0.weight" in self.message

    def test_a_loss_that_misses_the_scope(self) -> None:
        other = nn.Parameter(torch.ones(()))
        self.trace(small(), batches(), lambda m, b: other * 2)
        assert "0.weight" in self.message

    def test_two_parameters_in_one_memory(self) -> None:
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 30))
        model[1].weight.data = model[0].weight.data
        self.trace(model, batches())
        assert "0.weight and 1.weight" in self.message

    def test_a_loader_that_ends_early_is_said_so(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            sylva_compile.trace_and_mask(small(), batches(2), loss_fn=regression, **OPTIONS)
        assert "ended after 16 of num_samples=1024" in caplog.text


def test_a_failure_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    """The other ranks do not wait for a process that has ended."""
    first, second = (text.splitlines() for text in two_ranks.run("trace_two_ranks.py", tmp_path, "failing"))
    assert second[0].startswith("TraceError: The loader gave no batches")
    assert first[0].startswith("TraceError: Process 1 of 2 could not trace: The loader gave no batches")
    assert first[1] == second[1]
    assert first[1].startswith("ArgumentError: num_samples=1 is less than the 2 processes")


def test_two_ranks_end_with_the_masks_of_all_their_data(tmp_path: Path) -> None:
    two_ranks.run("trace_two_ranks.py", tmp_path)
    model, data = model_and_data()
    for method, score in METHODS:
        first, second = (Masks.load(tmp_path / f"{method}-{score}{rank}") for rank in (0, 1))
        assert dict(first) == dict(second)
        if method != "random":
            alone = sylva_compile.trace_and_mask(
                model, data, loss_fn=regression, method=method, score=score, rank=32, num_samples=32, **OPTIONS
            )
            assert dict(first) == dict(alone)
