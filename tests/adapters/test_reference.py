"""A reference model gives the base's outputs, in the model's memory, to trainers that expect a model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import random_masks
from tiny_models import tiny
from torch import nn
from transformers import PreTrainedModel

import sylva_compile
from sylva_compile import Masks
from sylva_compile.errors import AdapterError

NAMES = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)] + ["model.layers.1.mlp.up_proj.weight"]


def llama() -> tuple[PreTrainedModel, PreTrainedModel, Masks, dict[str, torch.Tensor]]:
    """Return a base, the same model with trained blocks in training mode, the masks, and a batch."""
    case = tiny("llama")
    model = case.model.requires_grad_(False)
    base = copy.deepcopy(model).eval()
    masks = random_masks(model, NAMES, 8, 0.5)
    with torch.no_grad():
        for blocks in masks.parameters():
            blocks.add_(torch.randn_like(blocks))
    return base, model, masks, case.batch


def test_the_output_is_the_bases_and_the_model_stays_as_it_was() -> None:
    base, model, masks, batch = llama()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    reference = sylva_compile.reference_model(model)
    trained = model(**batch).logits.detach()
    for _ in range(2):
        output = reference(**batch)
        assert type(output) is type(base(**batch))
        assert torch.equal(output.logits, base(**batch).logits)
        assert not output.logits.requires_grad
        assert torch.equal(model(**batch).logits, trained)
        assert [module.training for module in model.modules()] == modes
    assert not torch.equal(output.logits, trained)
    assert torch.is_grad_enabled()
    assert masks.parameters()[0].requires_grad


def test_dropout_is_off_in_it_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    base = copy.deepcopy(model).eval()
    random_masks(model, ["0.weight"], 8, 0.5).embed()
    reference, x = sylva_compile.reference_model(model), torch.randn(4, 16)
    assert torch.equal(reference(x), base(x))
    reference.train()
    assert torch.equal(reference(x), base(x))
    reference.eval()
    assert model.training
    assert (model(x) == 0).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_of_both(compiled: bool) -> None:
    base, model, masks, batch = llama()
    if compiled:
        model.compile(backend=sylva_compile.backend(masks, inner="aot_eager", on_miss="error"))
    reference = sylva_compile.reference_model(model)
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
    for _ in range(2):
        ours = model(**batch)
        theirs = reference(**batch)
        torch.testing.assert_close(theirs.logits, base(**batch).logits)
        (ours.loss + (ours.logits - theirs.logits).square().mean()).backward()
        assert all(blocks.grad is not None and blocks.grad.any() for blocks in masks.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_it_owns_nothing() -> None:
    base, model, _, _ = llama()
    reference = sylva_compile.reference_model(model)
    assert not list(reference.parameters())
    assert not list(reference.buffers())
    assert list(reference.modules()) == [reference]
    both = nn.ModuleList([model, reference])
    assert len(list(both.parameters())) == len(list(model.parameters()))
    assert len(both.state_dict()) == len(model.state_dict())
    assert reference.config is model.config
    assert (reference.device, reference.dtype) == (model.device, model.dtype)
    reference.to(torch.float64)
    reference.requires_grad_(False)
    assert model.dtype == torch.float32
    found = reference.state_dict()
    assert list(found) == list(base.state_dict())
    assert all(torch.equal(found[name], value) for name, value in base.state_dict().items())
    with pytest.raises(NotImplementedError, match="shares the weights"):
        reference.load_state_dict(found)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = reference.no_such_name


def test_methods_of_the_model_run_with_the_base(tmp_path: Path) -> None:
    base, model, _, batch = llama()
    reference = sylva_compile.reference_model(model)
    prompt = batch["input_ids"][:1, :4]
    expected = base.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(reference.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    reference.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in base.state_dict().items())


def test_inside_of_disable_adapter_it_is_no_other_model() -> None:
    base, model, _, batch = llama()
    reference = sylva_compile.reference_model(model)
    with sylva_compile.disable_adapter(model):
        assert torch.equal(reference(**batch).logits, base(**batch).logits)
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)


def test_a_copy_has_a_model_of_its_own() -> None:
    _, model, _, batch = llama()
    reference = sylva_compile.reference_model(model)
    twin = copy.deepcopy(reference)
    assert torch.equal(twin(**batch).logits, reference(**batch).logits)


def test_in_a_compiled_function() -> None:
    base, model, _, batch = llama()
    reference = sylva_compile.reference_model(model)
    run = torch.compile(reference, backend="aot_eager")
    torch.testing.assert_close(run(**batch).logits, base(**batch).logits)


def test_a_model_without_blocks() -> None:
    """Its reference would be itself, and a penalty on the distance of both always zero."""
    with pytest.raises(AdapterError, match="carries no trained blocks"):
        sylva_compile.reference_model(nn.Linear(3, 3))


@pytest.mark.filterwarnings("ignore")
def test_what_trl_does_with_a_reference_model() -> None:
    """DPOTrainer 1.16 puts a forward of its own into the model and the reference, which calls the backbone."""
    utils: Any = pytest.importorskip("trl.trainer.utils")
    from accelerate import Accelerator

    base, model, _, batch = llama()
    reference = sylva_compile.reference_model(model)
    for each in (base, model, reference):
        utils.disable_dropout_in_model(each)
        utils.add_fused_lm_head(each)
    assert utils.hash_module(reference) == utils.hash_module(base)
    prepared = Accelerator(cpu=True).prepare_model(reference, evaluation_mode=True)
    wanted = base(**batch, fused_lm_head=True).log_probs
    for each in (prepared, reference):
        assert torch.equal(each(**batch, fused_lm_head=True).log_probs, wanted)
    assert not torch.equal(model(**batch, fused_lm_head=True).log_probs, wanted)
    # SyncRefModelCallback walks over the parameters of both.
    with pytest.raises(ValueError, match="zip"):
        list(zip(reference.parameters(), model.parameters(), strict=True))
