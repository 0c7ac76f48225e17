"""`sylva-compile finetune`: load, trace, embed, compile, train, save."""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec

from torch import Tensor, distributed
from transformers import PreTrainedModel, set_seed

from sylva_compile.adapters.saving import save_adapter
from sylva_compile.blocks.masks import Masks
from sylva_compile.cli.data import load
from sylva_compile.cli.logs import is_first_rank, shows_bars
from sylva_compile.cli.options import DataConfig, FinetuneConfig, ModelConfig
from sylva_compile.cli.run_folder import RunFolder
from sylva_compile.cli.sequences import Example, batches_of, hold_out
from sylva_compile.cli.signals import INTERRUPTED, StopAsked
from sylva_compile.cli.training import StopCallback, make_trainer, training_arguments
from sylva_compile.compiler.backend import backend
from sylva_compile.compiler.layers import compile_layers
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import InputError, UsageError
from sylva_compile.tracing.trace import trace_and_mask

log = logging.getLogger(__name__)


def run(base: ModelConfig, data: DataConfig, options: FinetuneConfig, settings: SylvaConfig) -> int:
    """Fine-tune, and return the exit code."""
    if data.data is None:
        raise UsageError("--data is missing; give a file, or the name of a data set on the hub.")
    if find_spec("accelerate") is None:
        raise InputError("The Trainer of transformers needs accelerate; run `pip install accelerate`.")
    folder = RunFolder(options.out, (base, data, options, settings), resume=options.resume)
    if folder.goes_on and folder.is_finished:
        _say(f"This run is finished; its adapter is in {options.out}.")
        return 0
    settings = replace(settings, progress=shows_bars())
    set_seed(data.seed)
    masks = folder.masks() if folder.goes_on else None
    if options.masks is not None:
        masks = Masks.load(options.masks) if masks is None else masks
        settings = _as_in(masks, settings)
    model, _, examples = load(base, data)
    if folder.goes_on:
        folder.check_data(examples)
    train, held_out = hold_out(examples, data)
    _say(f"{len(train)} sequences of {len(train[0]['input_ids'])} tokens to train on, {len(held_out)} held out.")

    arguments = training_arguments(options.out, data, options)
    model.to(arguments.device)  # type: ignore[arg-type]
    batches = _batches_to_trace(train, data, settings)
    if masks is None:
        group = distributed.group.WORLD if _is_distributed() else None
        masks = trace_and_mask(model, batches if settings.needs_data else None, settings, process_group=group)
    # Moving blocks change the masks, and a run that goes on begins with these.
    first_masks = copy.deepcopy(masks)
    masks.embed(model)
    if options.gradient_checkpointing:
        _checkpoint_gradients(model)
    compiler = backend(masks, inner=options.inner)
    compile_layers(model, compiler)
    asked = StopAsked()
    stop = StopCallback(asked)
    trainer = make_trainer(
        model,
        masks,
        arguments,
        options=options,
        settings=settings,
        train=train,
        held_out=held_out,
        batches=batches,
        stop=stop,
    )
    if folder.goes_on:
        before = folder.loss_before
    else:
        before = trainer.evaluate()["eval_loss"] if held_out else None
        if is_first_rank():
            folder.begin(first_masks, examples, before)
    # As in a run that goes on without a checkpoint, and so without the evaluation above.
    set_seed(data.seed)
    try:
        with asked.listening():
            trainer.train(resume_from_checkpoint=bool(folder.goes_on and folder.checkpoints()) or None)
    except KeyboardInterrupt:
        last = max((int(path.name.rpartition("-")[2]) for path in folder.checkpoints()), default=0)
        log.error("interrupted inside a step; run the same command with --resume to go on from step %d.", last)
        return INTERRUPTED
    if stop.stopped:
        done = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        _say(f"Interrupted after {done}; run the same command with --resume to go on.")
        return INTERRUPTED
    if is_first_rank():
        save_adapter(model, options.out)
        # Checkpoints are optional; `report` reads the curves from here.
        trainer.save_state()
    after = trainer.evaluate()["eval_loss"] if held_out else None
    report = compiler.report()
    trained = sum(parameter.numel() for parameter in masks.parameters())
    _say(f"{report.rewritten} of {len(report)} weight gradients rewritten, {trained:,} elements trained.")
    for when, loss in (("before", before), ("after", after)):
        if loss is not None:
            _say(f"held-out loss {when}: {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    _say(f"adapter: {options.out}")
    return 0


def _as_in(masks: Masks, settings: SylvaConfig) -> SylvaConfig:
    """Return `settings` with those that chose `masks`, by which moves go on.

    Raises:
        UsageError: an option asks for other blocks.
    """
    usual, found = SylvaConfig(), {}
    for field in fields(settings):
        if not field.metadata["chooses"] or field.name == "num_samples":
            continue
        asked, default = getattr(settings, field.name), getattr(usual, field.name)
        found[field.name] = masks.config.get(field.name, default)
        if asked not in (default, found[field.name]):
            raise UsageError(
                f"--{field.name.replace('_', '-')} {asked} asks for other blocks than those of --masks "
                f"({found[field.name]}); leave it out."
            )
    return replace(settings, **found)


def _batches_to_trace(train: Sequence[Example], data: DataConfig, settings: SylvaConfig) -> list[dict[str, Tensor]]:
    """Return the batches to trace, of which each process has its own."""
    if not _is_distributed():
        return batches_of(train, data.batch_size, settings.num_samples)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    return batches_of(train[rank::ranks], data.batch_size, -(-settings.num_samples // ranks))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    # A release of transformers 5 renamed the method. Reentrant checkpointing needs an input that requires grad, and the
    # frozen embeddings give none.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _say(text: str) -> None:
    if is_first_rank():
        print(text, flush=True)
