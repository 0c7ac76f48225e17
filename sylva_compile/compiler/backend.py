"""`torch.compile(model, backend=sylva_compile.backend(masks))`: Inductor, with sampled weight gradients.

Dynamo calls the backend once for each graph. One model may have many graphs (graph breaks, checkpointing,
DistributedDataParallel's buckets, layers compiled one by one), and several layers may share one compiled graph. So a
compiled graph takes the positions of blocks as inputs and holds no part of a mask. The backend keeps a report for each
embedded weight and fills it when a compiled graph first runs with that weight.
"""

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from sylva_compile._torch import (
    CustomGraphPass,
    PlainAOTInput,
    ShortenTraceback,
    compile_fx,
    functorch_config,
    get_hash_for_files,
    inductor_config,
    list_mode_options,
)
from sylva_compile.blocks import registry
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.masks import Masks
from sylva_compile.compiler.aot import compile_eagerly
from sylva_compile.compiler.kinds import KINDS
from sylva_compile.compiler.report import Report, WeightReport
from sylva_compile.compiler.retrace import update_layouts
from sylva_compile.compiler.runtime_wrapper import RuntimeWrapper
from sylva_compile.errors import ArgumentError, RewriteError
from sylva_compile.nm.masks import NMMasks
from sylva_compile.passes.recompute_weights import recompute_weights_pass
from sylva_compile.passes.runner import Pass, run_passes
from sylva_compile.passes.sample_weight_gradients import RewriteResult, sample_weight_gradients_pass
from sylva_compile.passes.sketch_block_norms import sketch_block_norms_pass

log = logging.getLogger(__name__)

Inner = Literal["inductor", "aot_eager"]
OnMiss = Literal["warn", "error", "ignore"]

_PACKAGE = Path(__file__).parents[1]
_HASHED_ROOMS = ("compiler", "kernels", "passes")


class _RewriteError(RewriteError, ShortenTraceback):
    """A RewriteError that Dynamo neither wraps nor swallows, because it is a ShortenTraceback."""


class _ArgumentError(ShortenTraceback, ArgumentError):
    """An ArgumentError about `torch.compile` that Dynamo neither wraps nor swallows."""


class _JointPass(CustomGraphPass):
    """The passes over one joint graph, at the place that Inductor keeps for custom passes."""

    def __init__(
        self,
        before: Any,
        update: Callable[[list[RewriteResult]], None],
        is_positions: Callable[[Node], bool] | None = None,
    ) -> None:
        """Make the pass of one graph.

        Args:
            before: the user's own `joint_custom_pre_pass`, which runs first, or None.
            update: called with the results before code is generated; it may raise TraceAgain.
            is_positions: tells the inputs that are positions of blocks in a quantised weight; None: none is.
        """
        self.before, self.update, self.is_positions = before, update, is_positions
        self.results: list[RewriteResult] = []

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        sample = functools.partial(sample_weight_gradients_pass, report=self.results.append)
        recompute = functools.partial(recompute_weights_pass, is_positions=self.is_positions)
        passes: dict[str, Pass] = {
            "recompute_weights": recompute,
            "sketch_block_norms": sketch_block_norms_pass,
            "sample_weight_gradients": sample,
        }
        run_passes(graph, passes)
        self.update(self.results)

    def uuid(self) -> Any:
        """Return the key of these passes in Inductor's cache; None, for no caching, if `before` has none."""
        theirs = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        if self.before is not None and theirs is None:
            return None
        return source_hash(), theirs


@functools.cache
def source_hash() -> bytes:
    """Return the hash of the Python files of compiler, kernels and passes, as part of Inductor's cache key."""
    files = sorted(file for room in _HASHED_ROOMS for file in (_PACKAGE / room).rglob("*.py"))
    return get_hash_for_files(tuple(map(str, files)))


class Backend:
    """A backend for `torch.compile`; made by `sylva_compile.backend`."""

    def __init__(self, masks: Masks | NMMasks | None, inner: Inner, on_miss: OnMiss) -> None:
        """See `backend`."""
        if inner not in ("inductor", "aot_eager"):
            raise ArgumentError(f"inner={inner!r}; use 'inductor' or 'aot_eager'.")
        if on_miss not in ("warn", "error", "ignore"):
            raise ArgumentError(f"on_miss={on_miss!r}; use 'warn', 'error' or 'ignore'.")
        if masks is not None and not isinstance(masks, tuple(kind.masks for kind in KINDS)):
            raise ArgumentError(
                f"masks is a {type(masks).__name__}; give those that trace_and_mask or prune_masks returns."
            )
        if masks is not None:
            masks.embed()
        self.masks, self.inner, self.on_miss = masks, inner, on_miss
        self.__name__ = "sylva"
        self._reports: weakref.WeakKeyDictionary[BlockState, WeightReport] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one Dynamo graph; `mode` and `options` are those of `torch.compile` and go to Inductor."""
        if self.inner == "aot_eager" and (options or mode not in (None, "default")):
            asked = f"mode={mode!r}" if mode else f"options={options!r}"
            raise _ArgumentError(f"{asked} controls code generation; use inner='inductor'.", first_useful_frame=None)
        registry.tidy()
        update = functools.partial(self._update_layouts, gm, example_inputs)
        if not torch.is_grad_enabled():
            # AOTAutograd makes no joint graph of an evaluation.
            update([])
        joint = _JointPass(_user_pass(options), update, functools.partial(_is_quantised_place, example_inputs))
        # A graph from AOTAutograd's cache comes without its joint pass, and so without its results. Inductor's own
        # cache, which saves the code generation, stays on.
        with functorch_config.patch(enable_autograd_cache=False):
            if self.inner == "inductor":
                compiled = _compile_with_inductor(gm, example_inputs, joint, mode, options)
            else:
                compiled = compile_eagerly(gm, example_inputs, joint)
        self._check(joint.results, example_inputs)
        # A weight that the graph uses several times has a result for each use.
        indexed = [(index, result) for result in joint.results if (index := _input_index(result)) is not None]
        return RuntimeWrapper(compiled, indexed, self._note, _states_of(gm.parameters()))

    def report(self) -> Report:
        """Return what became of every embedded weight's gradient in the compiled graphs that have run so far.

        A backend without masks reports every embedded weight of the process. Where two models have weights of one name,
        the later model's get a number: "layer.weight (2)".
        """
        model = self._model()
        states = block_states(model) if model is not None else _by_unique_name(registry.live_states())
        others = {} if model is None else {name: line for kind in KINDS for name, line in kind.report(model).items()}
        return Report({name: self._reports.get(state, WeightReport()) for name, state in states.items()}, others)

    def _model(self) -> nn.Module | None:
        return None if self.masks is None else self.masks.model

    def _update_layouts(self, gm: GraphModule, example_inputs: Sequence[Any], results: list[RewriteResult]) -> None:
        model = self._model()
        if model is not None:
            indexed = [(result, _input_index(result)) for result in results]
            found = [(result, example_inputs[index]) for result, index in indexed if index is not None]
            states = block_states(model)
            compiled_before = {name for name, state in states.items() if state in self._reports}
            update_layouts(states, compiled_before, found, gm, example_inputs)

    def _check(self, results: list[RewriteResult], example_inputs: Sequence[Any]) -> None:
        """Warn of weight gradients that stay dense, or raise RewriteError, as `on_miss` says."""
        for result in results:
            if result.reason is None:
                continue
            # DistributedDataParallel's splitter compiles with fake examples, which belong to no state.
            index = _input_index(result)
            state = None if index is None else registry.state_of_positions(example_inputs[index])
            name = "a weight" if state is None else state.name
            message = f"{name}: the weight gradient stays dense, {result.reason}."
            if self.on_miss == "error":
                raise _RewriteError(
                    f"{message} Leave it out of the scope, or compile with on_miss='warn'.", first_useful_frame=None
                )
            if self.on_miss == "warn":
                log.warning(
                    "%s Training is right but slower there; leave it out of the scope to silence this.", message
                )

    def _note(self, state: BlockState, result: RewriteResult) -> None:
        """Add `result` to the report of `state`; not that of a graph which runs only before moves."""
        if result.scored:
            return
        before = self._reports.get(state, WeightReport())
        self._reports[state] = WeightReport(
            uses=before.uses + 1,
            reason=before.reason or result.reason,
            narrowed=result.narrowed and (before.narrowed or not before.uses),
            whole_reason=before.whole_reason or result.whole_reason,
        )


def backend(masks: Masks | NMMasks | None = None, *, inner: Inner = "inductor", on_miss: OnMiss = "warn") -> Backend:
    """Return a `torch.compile` backend that computes only the masked blocks of weight gradients.

    Args:
        masks: masks bound to the model to compile, of `trace_and_mask` or of `prune_masks`; they are embedded now
            unless they are already. None: the backend compiles whatever blocks a model carries, as the registered name
            `"sylva"` does.
        inner: `"inductor"` generates code; `"aot_eager"` runs the same rewritten graphs without it, for debugging.
        on_miss: the reaction to a weight gradient that cannot be sampled: `"warn"`, `"error"` or `"ignore"`. The
            gradient is computed densely then: right, but slower.

    Raises:
        ArgumentError: `inner` or `on_miss` is none of these, or `masks` is no Masks.
        MaskError, ScopeError, EmbedError: the masks do not fit or are not bound, a weight cannot carry blocks, or the
            model carries other masks.
        RewriteError: later, when a graph is compiled with `on_miss="error"` and a gradient stays dense.
    """
    return Backend(masks, inner, on_miss)


@functools.cache
def _registered() -> Backend:
    return backend()


def sylva(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """Compile the graph with whatever blocks it holds: the backend of `torch.compile(model, backend="sylva")`."""
    return _registered()(gm, example_inputs, **kwargs)


def _by_unique_name(states: Iterable[BlockState]) -> dict[str, BlockState]:
    found: dict[str, BlockState] = {}
    for state in states:
        number = next(number for number in itertools.count(1) if _numbered(state.name, number) not in found)
        found[_numbered(state.name, number)] = state
    return found


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _is_quantised_place(example_inputs: Sequence[Any], placeholder: Node) -> bool:
    desc = placeholder.meta.get("desc")
    state = registry.state_of_positions(example_inputs[desc.idx]) if isinstance(desc, PlainAOTInput) else None
    return state is not None and state.is_quantised


def _input_index(result: RewriteResult) -> int | None:
    """Return the index of the graph's input that holds the positions; None in a graph within the graph.

    `nested_compile_region` makes such graphs.
    """
    desc = result.positions.meta.get("desc")
    return desc.idx if isinstance(desc, PlainAOTInput) else None


def _user_pass(options: Mapping[str, Any] | None) -> Any:
    return (options or {}).get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)


def _compile_with_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    joint: _JointPass,
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {}), "joint_custom_pre_pass": joint}
    values = [*example_inputs, *gm.parameters()]
    if patches.get("freezing", inductor_config.freezing) and any(map(_is_carried, values)):
        log.info("Inductor's freezing is off for this graph: it would make constants of weights that training changes.")
        patches["freezing"] = False
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _is_carried(value: Any) -> bool:
    return isinstance(value, Tensor) and any(kind.is_carried(value) for kind in KINDS)


def _states_of(values: Iterable[Any]) -> list[BlockState]:
    """Return the states whose dense weights are among `values`."""
    found = (registry.state_of_weight(value) for value in values if isinstance(value, Tensor))
    return [state for state in found if state is not None]
