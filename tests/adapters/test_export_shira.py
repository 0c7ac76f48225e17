from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny

import sylva_compile
from sylva_compile.errors import AdapterError, EmbedError
from sylva_compile.schedules import MovingBlocks

# PEFT makes a sparse tensor and neither asks for checks nor declines them.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")


def train(model: torch.nn.Module, masks: sylva_compile.Masks, batch: dict[str, torch.Tensor], every: int) -> None:
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=1e-2)
    moving = MovingBlocks(masks, every=every)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        moving.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 9])
def test_peft_gives_the_same_logits(dtype: torch.dtype, every: int, tmp_path: Path) -> None:
    case = tiny("llama")
    model = case.model.to(dtype).requires_grad_(False)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    # 24 divides none of the sizes, so that some blocks reach over an edge.
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.9, block_size=24 if every == 9 else 8)
    train(model, masks, case.batch, every)
    sylva_compile.export_peft(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {path.stat().st_mode & 0o044 for path in tmp_path.iterdir()} == {0o044}
    fresh = tiny("llama").model.to(dtype)
    fresh.load_state_dict(base)
    peft = PeftModel.from_pretrained(fresh, tmp_path)
    tolerance = 1e-5 if dtype == torch.float32 else 0.0
    with torch.no_grad():
        expected = model.eval()(**case.batch).logits
        torch.testing.assert_close(peft.eval()(**case.batch).logits, expected, rtol=tolerance, atol=tolerance)
        merged = peft.merge_and_unload()
        torch.testing.assert_close(merged(**case.batch).logits, expected, rtol=tolerance, atol=tolerance)


def test_another_module_than_linear_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2").model.requires_grad_(False)
    sylva_compile.trace_and_mask(model, method="random", block_size=8).embed()
    with pytest.raises(
        AdapterError, match=r"c_attn.weight belongs to a Conv1D, and PEFT's SHiRA knows nn.Linear alone"
    ):
        sylva_compile.export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_many_places_are_refused(tmp_path: Path) -> None:
    model = tiny("llama").model.requires_grad_(False)
    sylva_compile.trace_and_mask(model, method="random", sparsity=0.0, block_size=8).embed()
    with pytest.raises(AdapterError, match=r"needs SHiRA's r = \d+, and model.layers.0.self_attn.q_proj.weight"):
        sylva_compile.export_peft(model, tmp_path / "out")


def test_models_without_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="carries no trained blocks"):
        sylva_compile.export_peft(tiny("llama").model, tmp_path)


def test_modules_that_are_stored_whole_are_refused(tmp_path: Path) -> None:
    model = tiny("llama").model
    sylva_compile.trace_and_mask(model, method="random", block_size=8).embed()
    sylva_compile.save_adapter(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    sylva_compile.load_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"lm_head.weight whole, and SHiRA has single places alone"):
        sylva_compile.export_peft(model, tmp_path / "out")


def test_what_shira_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = tiny("llama").model.requires_grad_(False)
    masks = sylva_compile.trace_and_mask(model, method="random", sparsity=0.9, block_size=8)
    masks.embed(model)
    with sylva_compile.disable_adapter(model), pytest.raises(EmbedError, match="shows its base"):
        sylva_compile.export_peft(model, tmp_path / "shown")
    model.lm_head.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"outside of the blocks .* lm_head\.weight first"):
        sylva_compile.export_peft(model, tmp_path / "head")
    model.lm_head.requires_grad_(False)
    with torch.no_grad():
        masks.parameters()[0].view(-1)[0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        sylva_compile.export_peft(model, tmp_path / "nan")
    assert not list(tmp_path.iterdir())
