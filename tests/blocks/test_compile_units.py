import pytest
from tiny_models import ARCHITECTURES, tiny
from torch import Tensor, nn

from sylva_compile.blocks.compile_units import compile_units


def weights_of(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Model(nn.Module):
    """A model whose own code is not compiled in these tests."""

    def __init__(self, layers: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.layers, self.head = layers, head


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_real_architectures(architecture: str) -> None:
    model = tiny(architecture).model
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
        and any(f".{part}." in name for part in ("layers", "layer", "h", "block"))
        and "relative_attention_bias" not in name
    ]
    units = compile_units(model, weights)
    assert units is not None
    kinds = {type(unit).__name__ for unit in units}
    assert kinds in (
        {"LlamaDecoderLayer"},
        {"GPT2Block"},
        {"T5Block"},
        {"RobertaLayer"},
        {"OPTDecoderLayer"},
        {"Qwen2DecoderLayer"},
        {"GemmaDecoderLayer"},
    )
    assert len(units) == (3 if architecture == "t5" else 2)


def test_the_outermost_list_counts() -> None:
    inner = [Model(nn.ModuleList([Block(), Block()])) for _ in range(3)]
    for each in inner:
        each.__class__ = type("Layer", (Model,), {"forward": lambda self, x: x})
    model = Model(nn.ModuleList(inner))
    assert compile_units(model, weights_of(model)) == inner


def test_layers_without_weights_are_left_out() -> None:
    model = Model(nn.ModuleList([Block(), Block(), Block()]))
    assert compile_units(model, [model.layers[1].lin.weight]) == [model.layers[1]]


def test_a_module_outside_of_the_lists_is_a_unit() -> None:
    projector = Model(nn.Linear(4, 4), Block())
    projector.__class__ = type("Projector", (Model,), {"forward": lambda self, x: self.head(self.layers(x))})
    model = Model(nn.ModuleList([Block(), Block()]), projector)
    assert compile_units(model, weights_of(model)) == [*model.layers, projector]


def test_code_of_torch_outside_compiles_the_model_whole() -> None:
    """Dynamo does not compile the `forward` of a linear layer that uncompiled code calls."""
    for head in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2)):
        model = Model(nn.ModuleList([Block(), Block()]), head)
        assert compile_units(model, weights_of(model)) is None
        assert compile_units(model, weights_of(model.layers)) == list(model.layers)


def test_members_that_torch_wrote_are_no_layers() -> None:
    model = Model(nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))]))
    assert compile_units(model, weights_of(model)) is None


def test_lists_without_code_are_no_layers() -> None:
    model = Model(nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])]))
    assert compile_units(model, weights_of(model)) == [*model.layers[0], *model.layers[1]]


def test_no_list_compiles_the_model_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert compile_units(model, weights_of(model)) is None


def test_a_module_that_layers_share_belongs_to_each() -> None:
    shared = Block()
    layers = [Model(shared), Model(shared)]
    for each in layers:
        each.__class__ = type("Layer", (Model,), {"forward": lambda self, x: self.layers(x)})
    model = Model(nn.ModuleList(layers))
    assert compile_units(model, [shared.lin.weight]) == layers


def test_a_weight_that_layers_share_belongs_to_each() -> None:
    model = Model(nn.ModuleList([Block(), Block()]))
    model.layers[1].lin.weight = model.layers[0].lin.weight
    assert compile_units(model, [model.layers[0].lin.weight]) == list(model.layers)
