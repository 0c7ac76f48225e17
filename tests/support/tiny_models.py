"""Tiny, randomly initialised models of common architectures, with a batch for each. No dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

VOCABULARY = 64
ARCHITECTURES = ("llama", "gpt2", "t5", "roberta", "opt", "qwen2", "gemma")


@dataclass
class Case:
    model: PreTrainedModel
    batch: dict[str, Tensor]


def tiny(architecture: str, *, length: int = 10, layers: int = 2) -> Case:
    """Make a model of `architecture`, in training mode, and a batch of four sequences of `length` tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    decoder = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2, "use_cache": False}
    no_special = {"bos_token_id": None, "eos_token_id": None}
    ids = torch.randint(3, VOCABULARY, (4, length))
    batch = {"input_ids": ids, "labels": ids}
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**decoder))
    elif architecture == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64, **no_special)
        config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.0
        config.use_cache = False
        model = GPT2LMHeadModel(config)
    elif architecture == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_decoder_layers": 1, "num_heads": 4}
        config = T5Config(**sizes, vocab_size=VOCABULARY)
        config.decoder_start_token_id, config.dropout_rate, config.use_cache = 0, 0.0, False
        model = T5ForConditionalGeneration(config)
    elif architecture == "roberta":
        config = RobertaConfig(**sizes, intermediate_size=48, max_position_embeddings=80, pad_token_id=1)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = RobertaForSequenceClassification(config)
        batch = {"input_ids": ids, "labels": torch.randint(0, 2, (4,))}
    elif architecture == "opt":
        config = OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=80, use_cache=False)
        config.dropout = config.attention_dropout = config.layerdrop = 0.0
        model = OPTForCausalLM(config)
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**decoder))
    elif architecture == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**decoder, head_dim=8))
    else:
        raise ValueError(architecture)
    return Case(model.train(), batch)


def checkpoint(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on."""
    model.activation_checkpointing_enable()
    for module in model.modules():
        # T5 marks a bias of zeros as trainable for the sake of reentrant checkpoints, which Dynamo cannot trace.
        # Without this line the first decoder layer would run uncompiled: correct, but dense (docs/limits.md).
        if isinstance(module, T5Attention):
            module.gradient_checkpointing = False
