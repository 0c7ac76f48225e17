"""Models are read from folders and GGUF files, and written beside and renamed."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_checkpoint import make_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sylva_compile.cli.models import check_new, load_model, write_model
from sylva_compile.errors import InputError


def save_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Write a Llama with the tokenizer of `make_tokenizer` as a GGUF file of float32."""
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocabulary]
    tokens += [f"<unused{k}>" for k in range(config.vocab_size - len(tokens))]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_is_read_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    tokenizer, model = load_model(str(tmp_path), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not any(p.requires_grad for p in model.parameters())
    assert tokenizer("The pub").input_ids


def test_a_gguf_file_becomes_an_ordinary_model(tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "source"))
    save_gguf(tmp_path / "tiny.gguf", source)
    tokenizer, model = load_model(str(tmp_path / "tiny.gguf"), torch.float32)
    assert tokenizer("The pub").input_ids == make_tokenizer()("The pub").input_ids
    assert not hasattr(model.config, "quantization_config")
    # GGUF stores the rows of queries and keys in another order; those of others are as they were.
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), source.get_parameter(name))
    write_model(model, tokenizer, tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("nothing")
    with pytest.raises(InputError, match="holds no causal language model"):
        load_model(str(tmp_path / "a.gguf"), torch.float32)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no causal language model with a tokenizer"):
        load_model(str(tmp_path), torch.float32)


def test_a_name_on_the_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--model nobody/nothing holds no causal language model"):
        load_model("nobody/nothing", torch.float32)


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = load_model(str(save_tiny_model(tmp_path / "model")), torch.float32)

    def crash(folder: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer, "save_pretrained", crash)
    with pytest.raises(OSError, match="no space left"):
        write_model(model, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_to_write_is_new_or_empty(tmp_path: Path) -> None:
    check_new(tmp_path / "a" / "b")
    (tmp_path / "a").mkdir()
    check_new(tmp_path / "a")
    (tmp_path / "a" / "file").touch()
    with pytest.raises(InputError, match="exists; give another name"):
        check_new(tmp_path / "a")
    with pytest.raises(InputError, match="is a file; give a folder"):
        check_new(tmp_path / "a" / "file" / "b")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"intermediate_size": 24}, "RuntimeError"),
        ({"hidden_size": "x"}, "Error"),
        ({"num_attention_heads": 0}, "Error"),
        ({"dtype": "float99"}, "AttributeError"),
        ([], "Error"),
    ],
)
def test_a_broken_configuration_is_an_error_in_one_line(changes: Any, error: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes if changes else changes))
    with pytest.raises(InputError, match=f"holds no causal language model with a tokenizer: .*{error}") as found:
        load_model(str(folder), None)
    assert "\n" not in str(found.value)
