"""The shapes of published models, for arithmetic that needs no weights."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Llama:
    """The shapes of a model of the Llama architecture, in bfloat16.

    Attributes:
        hidden, mlp: channels.
        layers: decoder layers.
        heads, key_value_heads: of attention.
        head_dim: channels of a head.
        vocabulary: tokens.
        tied: whether the head shares the embeddings' weight.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def attention(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the four weights of a layer's attention, outputs by inputs."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
        }

    def layer(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of a layer's weights in the default scope, outputs by inputs."""
        return self.attention() | {
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def frozen(self) -> int:
        """Return the number of a layer's values outside the default scope, norms included."""
        return 2 * self.hidden

    def weights(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and shape of every weight in the default scope."""
        for number in range(self.layers):
            for name, shape in self.layer().items():
                stacked = self.experts_in(name) > 1
                yield f"model.layers.{number}.{name}{'' if stacked else '.weight'}", shape

    def experts_in(self, name: str) -> int:
        """Return how many experts stand below each other in the weight `name`."""
        return 1

    def masked(self) -> int:
        """Return the number of values in these weights."""
        return self.layers * _values(self.layer())

    def linear(self) -> int:
        """Return the number of values among them that quantisation packs: those of `nn.Linear` layers."""
        return self.masked()

    def parameters(self) -> int:
        """Return the number of all values."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.masked() + self.layers * self.frozen() + self.hidden


@dataclass(frozen=True)
class Qwen3Moe(Llama):
    """The shapes of a mixture of experts of the Qwen3 architecture; `mlp` is the channels of one expert.

    Attributes:
        experts: in a layer.
    """

    experts: int

    def layer(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of a layer's weights in the default scope: experts stand below each other in a matrix."""
        return self.attention() | {
            "mlp.experts.gate_up_proj": (self.experts * 2 * self.mlp, self.hidden),
            "mlp.experts.down_proj": (self.experts * self.hidden, self.mlp),
        }

    def experts_in(self, name: str) -> int:
        """Return how many experts stand below each other in the weight `name`."""
        return self.experts if ".experts." in name else 1

    def frozen(self) -> int:
        """Return the number of a layer's values outside the default scope: norms, and the layer that routes."""
        return 2 * self.hidden + 2 * self.head_dim + self.experts * self.hidden

    def linear(self) -> int:
        """Return the number of values in `nn.Linear` layers: those of attention, since experts are parameters."""
        return self.layers * _values(self.attention())


DENSE = {
    "Llama-3.2-1B": Llama(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "Llama-3-8B": Llama(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "Llama-3-70B": Llama(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
}
MODELS: dict[str, Llama] = DENSE | {
    "Qwen3-30B-A3B": Qwen3Moe(2048, 768, 48, 32, 4, 128, 151936, tied=False, experts=128),
}


def _values(shapes: dict[str, tuple[int, int]]) -> int:
    return sum(m * n for m, n in shapes.values())
