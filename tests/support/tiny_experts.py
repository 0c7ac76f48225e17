"""Tiny mixtures of experts in the layouts of transformers 5, and modules of experts alone with a given routing."""

import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 64
EXPERTS = 4
MIXTURES = ("qwen3-moe", "mixtral", "olmoe", "gpt-oss", "llama4")


def tiny_mixture(architecture: str, *, layers: int = 1, implementation: str = "grouped_mm") -> PreTrainedModel:
    """Make a model of `architecture` with four experts a layer, in training mode."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    chosen = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    model: PreTrainedModel
    if architecture == "qwen3-moe":
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=48, num_experts=EXPERTS, num_experts_per_tok=2)
        model = Qwen3MoeForCausalLM(config)
    elif architecture == "olmoe":
        model = OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=2, pad_token_id=0))
    elif architecture == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**sizes, **chosen))
    elif architecture == "gpt-oss":
        # Its defaults name tokens that this vocabulary lacks.
        model = GptOssForCausalLM(GptOssConfig(**sizes, **chosen, pad_token_id=0))
    elif architecture == "llama4":
        chosen["num_experts_per_tok"] = 1
        every = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "pad_token_id": None}
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **chosen, **every))
    else:
        raise ValueError(architecture)
    for parameter in model.parameters():
        # Some classes leave the weights of experts to loading.
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    if architecture != "llama4":
        model.set_experts_implementation(implementation)
    return model.train()


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of stacked experts by name."""
    return {name: module for name, module in model.named_modules() if name.endswith("experts")}


class Routed(nn.Module):
    """A module of experts alone: the tokens `x [T, 32]` go to the experts that `chosen` and `weights [T, k]` say."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, chosen, weights)


def representable(*shape: int) -> Tensor:
    """Return random values that bfloat16 holds exactly."""
    return torch.randn(*shape).bfloat16().float()
