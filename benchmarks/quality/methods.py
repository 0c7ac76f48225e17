"""The fine-tuning methods that a grid compares. Each prepares a model and lists the parameters that it trains."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import peft
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import sylva_compile
from benchmarks.quality import layerwise, lora_layers, optimizers
from benchmarks.quality.optimizers import Groups, MakeOptimizer
from benchmarks.quality.tasks import Batch, head_of, heads_of
from benchmarks.quality.traces import PATTERNS, Scores, budget_elements, choose_once
from sylva_compile.blocks.moving import Carry
from sylva_compile.blocks.scope import weights_in_scope
from sylva_compile.config import Allocation, Score, SylvaConfig
from sylva_compile.config import Method as TraceMethod
from sylva_compile.schedules import LayerSchedule, MovingBlocks
from sylva_compile.schedules.layers import Policy
from sylva_compile.schedules.moving import Choose
from sylva_compile.tracing.trace import weight_specs


@dataclass
class Ready:
    """A model that a method has prepared for training.

    Attributes:
        model: the module that is called with the batches.
        trained: the parameters that train at the run's learning rate; the head's parameters train besides.
        checkpoint: returns the bytes that the saved result takes; call it after training.
        optimizer: makes the optimizer from parameter groups.
        trace_seconds: the seconds that the choice of blocks took.
        trace_bytes: the peak bytes of this choice beside the model.
        masks: the masks of the trained blocks, for methods that train blocks.
        begin: called with the training batches before the first step, once there is an optimizer.
        after_step: called after every step of the optimizer; blocks that move do it there.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    checkpoint: Callable[[], int]
    optimizer: MakeOptimizer = lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    trace_seconds: float = 0.0
    trace_bytes: int = 0
    masks: sylva_compile.Masks | None = None
    begin: Callable[[Sequence[Batch]], None] = lambda batches: None
    after_step: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Budgeted:
    """The budget of a method: the weights in `scope`, and as many elements as `sparsity` leaves of their blocks."""

    scope: str
    sparsity: float
    block_size: int

    def elements(self, model: nn.Module) -> int:
        """Return the number of elements that a method may train in `model`."""
        return budget_elements(weights_in_scope(model, self.scope), self.sparsity, self.block_size)


Traced = Callable[[Mapping[str, Any]], Scores]
"""A function that takes the options of a method and returns its block scores."""
Prepare = Callable[[nn.Module, Mapping[str, Any], Budgeted, Traced, int], Ready]


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        prepare: takes the model, the method's options, the budget, a function that returns block scores, and the seed;
            returns the prepared model.
        has_budget: whether the method trains about `Budgeted.elements` besides the head.
        options: the names of the options that the grid may set besides `kind`; `sparsity` takes the place of the
            grid's.
    """

    prepare: Prepare
    has_budget: bool = True
    options: frozenset[str] = frozenset()

    def is_traced(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method, with these options, traces data before it trains."""
        return options.get("trace") in ("sylva", "kfac", "fisher")

    def has_rank(self, options: Mapping[str, Any]) -> bool:
        """Return whether the method, with these options, uses the grid's `rank`."""
        return self.is_traced(options) or options.get("trace") == "lift"


def prepare_full(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning, which trains every parameter."""
    make = optimizers.for_dense(model, options)
    return Ready(model.requires_grad_(True), _besides_head(model), lambda: _state_bytes(model), make)


def prepare_linear(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning of the weights in scope, which is what blocks could train at most."""
    make = optimizers.for_dense(model, options)
    _head_alone(model)
    trained = list(weights_in_scope(model, budget.scope).values())
    for weight in trained:
        weight.requires_grad_(True)
    return Ready(model, trained, lambda: _state_bytes(model), make)


def prepare_layers(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare BAdam or LISA, which train whole layers, few at a time."""
    layers = layerwise.KINDS[options["kind"]](model, options, budget.scope, seed)
    return Ready(model, layers.trained, lambda: _state_bytes(model), layers.optimizer, after_step=layers.step)


def prepare_sharded(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare full fine-tuning with the optimizer's state sharded over the ranks.

    Without a process group, it makes one of this process alone.
    """
    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    ready = prepare_full(model, options, budget, traced, seed)

    def optimizer(groups: Groups) -> torch.optim.Optimizer:
        made = ZeroRedundancyOptimizer(groups[0]["params"], torch.optim.AdamW, lr=groups[0]["lr"], weight_decay=0.0)
        for group in groups[1:]:
            made.add_param_group(group)
        return made

    ready.optimizer = optimizer
    return ready


def prepare_head(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare training of the head alone, at the run's learning rate.

    Raises:
        ValueError: the model has no head.
    """
    if not head_of(model):
        raise ValueError("this model has no head; kind 'head' and head_steps are for classification")
    _head_alone(model)
    return Ready(model, head_of(model), lambda: _bytes(head_of(model)))


def prepare_peft(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare PEFT's LoRA, rsLoRA, DoRA or SHiRA on every weight in scope, at the rank nearest to the budget.

    With `policy`, the change of a few layers trains at a time.
    """
    kind = options["kind"]
    weights = weights_in_scope(model, budget.scope)
    # LoRA adds r(m + n) elements per weight, SHiRA trains as many of the weight itself, DoRA adds m magnitudes more.
    specs = weight_specs(model, weights).values()
    magnitudes = sum(spec.outputs for spec in specs) if kind == "dora" else 0
    per_rank = sum(sum(weight.shape) for weight in weights.values())
    rank = max(1, round((budget.elements(model) - magnitudes) / per_rank))
    targets = [name.removesuffix(".weight") for name in weights]
    # PEFT wraps the layers in place: in `model`, under the wrapper, the names of the head stay the same.
    config = (
        peft.ShiraConfig(r=rank, target_modules=targets, random_seed=seed)
        if kind == "shira"
        else peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=0.0,
            target_modules=targets,
            use_dora=kind == "dora",
            use_rslora=kind == "rslora",
            # GPT-2's layers store their weights transposed.
            fan_in_fan_out=all(spec.input_axis == 0 for spec in specs),
        )
    )
    wrapped = peft.get_peft_model(model, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    head = head_of(model)
    for parameter in head:
        parameter.requires_grad_(True)
    make = optimizers.for_dense(model, options)
    schedules: list[lora_layers.LoraLayers] = []

    def begin(batches: Sequence[Batch]) -> None:
        # It leaves most of the change without a gradient, so it comes after the optimizer.
        if "policy" in options:
            schedules.append(lora_layers.LoraLayers(wrapped, options, seed, batches))

    def after_step() -> None:
        for schedule in schedules:
            schedule.step()

    return Ready(wrapped, trained, lambda: _bytes([*trained, *head]), make, begin=begin, after_step=after_step)


class Adapter(nn.Module):
    """A layer followed by a bottleneck with a skip connection (Houlsby et al. 2019), which starts as the identity."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        size = layer.out_features
        self.layer, self.down, self.up = layer, nn.Linear(size, width), nn.Linear(width, size)
        nn.init.normal_(self.down.weight, std=1e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.to(layer.weight.device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the adapted outputs `[..., m]` of the layer, from `inputs [..., n]`."""
        value = self.layer(inputs)
        change: Tensor = self.up(nn.functional.gelu(self.down(value)))
        return value + change

    def added(self) -> list[nn.Parameter]:
        """Return the parameters of the bottleneck, which are trained."""
        return [*self.down.parameters(), *self.up.parameters()]


def prepare_adapter(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare serial adapters after the output projections of attention and MLP, of the width nearest to the budget.

    They are implemented here because the libraries that offer them require other versions of transformers.

    Raises:
        ValueError: the model has no module named '...output.dense'.
    """
    wanted = budget.elements(model)
    _head_alone(model)
    layers = {
        name: m for name, m in model.named_modules() if name.endswith("output.dense") and isinstance(m, nn.Linear)
    }
    if not layers:
        raise ValueError("no module named '...output.dense' to put an adapter after; this kind is for BERT-like models")
    sizes = [layer.out_features for layer in layers.values()]
    width = max(1, round((wanted - sum(sizes)) / sum(2 * size + 1 for size in sizes)))
    added: list[nn.Parameter] = []
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        adapter = Adapter(layer, width)
        setattr(model.get_submodule(parent), attribute, adapter)
        added += adapter.added()
    return Ready(model, added, lambda: _bytes([*added, *head_of(model)]))


def prepare_blocks(model: nn.Module, options: Mapping[str, Any], budget: Budgeted, traced: Traced, seed: int) -> Ready:
    """Prepare trainable blocks inside frozen weights, which move where the options have `every`.

    With `prune`, the rest of those weights is set to zero.
    """
    scores = traced(options)
    config = SylvaConfig(
        sparsity=budget.sparsity,
        allocation=options.get("allocation", "layer"),
        column_budget=options.get("column_budget"),
    )
    maps, seconds = choose_once(scores, config, options.get("pattern", "blocks"))
    masks = sylva_compile.Masks.from_block_maps(model, maps, budget.block_size)
    if options.get("prune", False):
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask.dense())
    _head_alone(model)
    masks.embed(model)
    moving = {name: options[name] for name in _OF_MOVES if name in options}
    schedules: list[MovingBlocks | LayerSchedule] = []
    if "every" in options:
        schedules.append(MovingBlocks(masks, seed=seed, **moving))

    def begin(batches: Sequence[Batch]) -> None:
        # It leaves most blocks without a gradient, so an optimizer that is made afterwards would not see them.
        if policy := options.get("policy"):
            schedules.append(LayerSchedule(masks, policy, options["fraction"], seed=seed, batches=batches))

    def after_step() -> None:
        for schedule in schedules:
            schedule.step()

    return Ready(
        model,
        masks.parameters(),
        lambda: _adapter_bytes(model),
        optimizers.for_blocks(options),
        trace_seconds=scores.seconds + seconds,
        trace_bytes=scores.peak_bytes,
        masks=masks,
        begin=begin,
        after_step=after_step,
    )


_OF_MOVES = ("every", "choose", "temperature", "column_budget", "carry")
_OF_LAYERS = ("policy", "fraction")
_OF_BLOCKS = {"trace", "score", "damping", "pattern", "allocation", "prune", "sparsity", *_OF_MOVES, *_OF_LAYERS}

METHODS = {
    "full": Method(prepare_full, has_budget=False, options=optimizers.OPTIONS),
    "linear": Method(prepare_linear, has_budget=False, options=optimizers.OPTIONS),
    "sharded": Method(prepare_sharded, has_budget=False),
    "badam": Method(prepare_layers, has_budget=False, options=layerwise.OPTIONS - {"layers"}),
    "lisa": Method(prepare_layers, has_budget=False, options=layerwise.OPTIONS),
    "head": Method(prepare_head, has_budget=False),
    **dict.fromkeys(
        ("lora", "rslora", "dora", "shira"),
        Method(prepare_peft, options=optimizers.OPTIONS | {"sparsity", *_OF_LAYERS}),
    ),
    "adapter": Method(prepare_adapter),
    "blocks": Method(prepare_blocks, options=optimizers.OPTIONS | _OF_BLOCKS),
}


def check_options(options: Mapping[str, Any]) -> str | None:
    """Return the error message for a method's table in a grid file, or None if the table is valid."""
    kind = options.get("kind")
    if kind not in METHODS:
        return f"kind={kind!r}; use one of {sorted(METHODS)}"
    strange = set(options) - {"kind"} - METHODS[kind].options
    if strange:
        return f"unknown options {sorted(strange)}; kind={kind!r} takes {sorted(METHODS[kind].options)}"
    if problem := optimizers.check(options):
        return problem
    if kind in layerwise.KINDS and (problem := layerwise.check(options)):
        return problem
    if problem := lora_layers.check(options):
        return problem
    if not 0 < options.get("sparsity", 0.5) < 1:
        return f"sparsity={options['sparsity']}; use the share of the blocks that stay frozen, between 0 and 1"
    if ("policy" in options) != ("fraction" in options):
        return "policy and fraction belong together: which layers are drawn, and what share of them"
    if "policy" in options and options["policy"] not in get_args(Policy):
        return f"policy={options['policy']!r}; use one of {get_args(Policy)}"
    if kind == "blocks":
        allowed = {
            "trace": get_args(TraceMethod),
            "score": get_args(Score),
            "pattern": PATTERNS,
            "allocation": get_args(Allocation),
            "choose": get_args(Choose),
            "carry": get_args(Carry),
        }
        if "every" not in options and (strange := {"choose", "temperature", "carry"} & options.keys()):
            return f"{min(strange)} is of blocks that move; give every, the number of steps between moves, too"
        if "trace" not in options:
            return f"no trace; use one of {allowed['trace']}"
        for name, values in allowed.items():
            if name in options and options[name] not in values:
                return f"{name}={options[name]!r}; use one of {values}"
    return None


def _head_alone(model: nn.Module) -> None:
    model.requires_grad_(False)
    for parameter in head_of(model):
        parameter.requires_grad_(True)


def _besides_head(model: nn.Module) -> list[nn.Parameter]:
    head = {id(parameter) for parameter in head_of(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]


def _bytes(tensors: list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _adapter_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        sylva_compile.save_adapter(model, folder, modules_to_save=heads_of(model))
        return sum(path.stat().st_size for path in Path(folder).iterdir())
