"""`torch.compile(model, backend=sylva_compile.backend(masks))`: Inductor, with sampled weight gradients.

Dynamo calls the backend once for each graph it makes: one graph is never promised (graph breaks, checkpointing,
DistributedDataParallel's buckets, layers compiled one by one), and one compiled graph may serve several layers. So
nothing of a mask is baked into a graph: positions are inputs. The report is kept per embedded weight and filled when a
compiled graph first runs with that weight.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch._dynamo.exc import ShortenTraceback
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule

from sylva_compile.blocks import embedding
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.site import BlockState, live_states
from sylva_compile.compiler.aot import compile_eagerly
from sylva_compile.compiler.following import RuntimeWrapper
from sylva_compile.compiler.report import Report, WeightReport
from sylva_compile.compiler.retrace import update_layouts
from sylva_compile.errors import ArgumentError, RewriteError
from sylva_compile.passes.runner import run_passes
from sylva_compile.passes.sample_weight_gradients import RewriteResult, sample_weight_gradients_pass

log = logging.getLogger(__name__)

Inner = Literal["inductor", "aot_eager"]
OnMiss = Literal["warn", "error", "ignore"]

_PACKAGE = Path(__file__).parents[1]


class _RewriteError(RewriteError, ShortenTraceback):
    """As a `ShortenTraceback`, Dynamo hands it to the user as it is, not wrapped and not swallowed."""


class _ArgumentError(ShortenTraceback, ArgumentError):
    """The same, for a wrong argument of `torch.compile`."""


class _JointPass(CustomGraphPass):
    """Our passes over one joint graph, in the place where Inductor lets others rewrite it."""

    def __init__(self, before: Any, learn: Callable[[list[RewriteResult]], None]) -> None:
        """`before` is a pass to run first, or None; `learn` may look at the outcomes before code is generated."""
        self.before, self.learn = before, learn
        self.outcomes: list[RewriteResult] = []

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        sample = functools.partial(sample_weight_gradients_pass, report=self.outcomes.append)
        run_passes(graph, {"sample_weight_gradients": sample})
        self.learn(self.outcomes)

    def uuid(self) -> Any:
        theirs = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        if self.before is not None and theirs is None:
            return None
        return _own_uuid(), theirs


@functools.cache
def _own_uuid() -> bytes:
    files = sorted(file for room in ("compiler", "kernels", "passes") for file in (_PACKAGE / room).rglob("*.py"))
    return get_hash_for_files(tuple(map(str, files)))


class Backend:
    """A backend for `torch.compile`; made by `sylva_compile.backend`."""

    def __init__(self, masks: Masks | None, inner: Inner, on_miss: OnMiss) -> None:
        """See `backend`."""
        if inner not in ("inductor", "aot_eager"):
            raise ArgumentError(f"inner={inner!r}; use 'inductor' or 'aot_eager'.")
        if on_miss not in ("warn", "error", "ignore"):
            raise ArgumentError(f"on_miss={on_miss!r}; use 'warn', 'error' or 'ignore'.")
        if masks is not None and not isinstance(masks, Masks):
            raise ArgumentError(f"masks is a {type(masks).__name__}; give the Masks that trace_and_mask returns.")
        if masks is not None:
            masks.embed()
        self.masks, self.inner, self.on_miss = masks, inner, on_miss
        self.__name__ = "sylva"
        self._found: weakref.WeakKeyDictionary[BlockState, WeightReport] = weakref.WeakKeyDictionary()

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
            raise _ArgumentError(f"{asked} says how to generate code; use inner='inductor'.", first_useful_frame=None)
        joint = _JointPass(_configured_pass(options), functools.partial(self._learn, gm, example_inputs))
        # A graph from AOTAutograd's cache comes without its joint pass, and so without a word on what was rewritten.
        # Inductor's own cache, which saves the code generation, stays on.
        with functorch_config.patch(enable_autograd_cache=False):
            if self.inner == "inductor":
                compiled = _inductor(gm, example_inputs, joint, mode, options)
            else:
                compiled = compile_eagerly(gm, example_inputs, joint)
        self._check(joint.outcomes, example_inputs)
        return self._follow(compiled, joint.outcomes)

    def report(self) -> Report:
        """What became of every masked weight's gradient in the compiled graphs that have run so far."""
        model = self.masks.model if self.masks is not None else None
        alive = live_states()
        known = embedding.sites(model) if model is not None else {site.name: site for site in alive}
        return Report({name: self._found.get(site, WeightReport()) for name, site in known.items()})

    def _learn(self, gm: GraphModule, example_inputs: Sequence[Any], outcomes: list[RewriteResult]) -> None:
        model = self.masks.model if self.masks is not None else None
        if model is not None:
            placed = [(outcome, _input_index(outcome)) for outcome in outcomes]
            found = [(outcome, example_inputs[index]) for outcome, index in placed if index is not None]
            sites = embedding.sites(model)
            settled = {name for name, site in sites.items() if site in self._found}
            update_layouts(sites, settled, found, gm, example_inputs)

    def _check(self, outcomes: list[RewriteResult], example_inputs: Sequence[Any]) -> None:
        names = {id(site.layout.positions): site.name for site in live_states()}
        for outcome in outcomes:
            if outcome.reason is None:
                continue
            # DistributedDataParallel's splitter compiles with fake examples, which nobody can tell apart.
            index = _input_index(outcome)
            name = "a weight" if index is None else names.get(id(example_inputs[index]), "a weight")
            message = f"{name}: the weight gradient stays dense, {outcome.reason}."
            if self.on_miss == "error":
                raise _RewriteError(
                    f"{message} Leave it out of the scope, or compile with on_miss='warn'.", first_useful_frame=None
                )
            if self.on_miss == "warn":
                log.warning(
                    "%s Training is right but slower there; leave it out of the scope to silence this.", message
                )

    def _follow(self, compiled: Callable[..., Any], outcomes: list[RewriteResult]) -> Callable[..., Any]:
        """Wrap `compiled` so that blocks and dense weights agree before it runs, and the report names what ran."""
        # Of one weight that is used several times, every use has its own outcome.
        marked = [(index, outcome) for outcome in outcomes if (index := _input_index(outcome)) is not None]
        follower = RuntimeWrapper(marked, self._note)

        def run(*args: Any) -> Any:
            follower.before_run(args)
            return compiled(*args)

        return run

    def _note(self, site: BlockState, outcome: RewriteResult) -> None:
        before = self._found.get(site, WeightReport())
        self._found[site] = WeightReport(
            uses=before.uses + 1,
            reason=before.reason or outcome.reason,
            narrowed=outcome.narrowed and (before.narrowed or not before.uses),
            whole=before.whole or outcome.whole,
        )


def backend(masks: Masks | None = None, *, inner: Inner = "inductor", on_miss: OnMiss = "warn") -> Backend:
    """A `torch.compile` backend that computes only the masked blocks of weight gradients.

    Args:
        masks: masks bound to the model to compile; embedded into it now if nobody did. None compiles whatever is
            embedded already (what the registered backend name `"sylva"` does).
        inner: `"inductor"` generates code; `"aot_eager"` runs the same rewritten graphs without, for debugging.
        on_miss: what to do about a weight gradient that cannot be sampled: `"warn"`, `"error"` or `"ignore"`. It is
            computed densely then: right, but slower.

    Raises:
        ArgumentError: `inner` or `on_miss` is none of these.
        MaskError, EmbedError: the masks do not fit, or the model carries others.
        RewriteError: later, when a graph is compiled with `on_miss="error"` and a gradient stays dense.
    """
    return Backend(masks, inner, on_miss)


@functools.cache
def _registered() -> Backend:
    return backend()


def sylva(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="sylva")`: compiles whatever is embedded."""
    return _registered()(gm, example_inputs, **kwargs)


def _input_index(outcome: RewriteResult) -> int | None:
    """Which of the graph's inputs the positions are; None in a graph within the graph (nested_compile_region)."""
    desc = outcome.positions.meta.get("desc")
    return desc.idx if isinstance(desc, PlainAOTInput) else None


def _configured_pass(options: Mapping[str, Any] | None) -> Any:
    return (options or {}).get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)


def _inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    joint: _JointPass,
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    patches = {**(list_mode_options(mode) if mode else {}), **(options or {}), "joint_custom_pre_pass": joint}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]
