"""A model that was trained here and loaded there writes the same text."""

import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import tiny
from transformers import LlamaForCausalLM

import sylva_compile

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
THERE = f"""
import sys
import torch
from transformers import LlamaForCausalLM
import sylva_compile

model = LlamaForCausalLM.from_pretrained(sys.argv[1])
sylva_compile.load_adapter(model, sys.argv[2])
ids = torch.load(sys.argv[3], weights_only=True)
torch.save(model.eval().generate(input_ids=ids, **{OPTIONS!r}), sys.argv[4])
"""


def test_the_same_tokens_in_a_new_process(tmp_path: Path) -> None:
    case = tiny("llama")
    case.model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    ids = case.batch["input_ids"][:2, :4].clone()
    before = model.eval().generate(input_ids=ids, **OPTIONS)
    masks = sylva_compile.trace_and_mask(model, method="random", block_size=8, sparsity=0.5)
    sylva_compile.compile_layers(model, sylva_compile.backend(masks, inner="aot_eager"))
    optimizer = sylva_compile.AdamW(masks.parameters(), lr=0.05)
    model.train()
    for _ in range(5):
        model(**case.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sylva_compile.save_adapter(model, tmp_path / "adapter")
    here = model.eval().generate(input_ids=ids, **OPTIONS)
    assert not torch.equal(here, before)
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "ids.pt", "there.pt")]
    subprocess.run([sys.executable, "-c", THERE, *paths], check=True, capture_output=True)
    assert torch.equal(here, torch.load(tmp_path / "there.pt", weights_only=True))
