"""`MovingBlocks`: the blocks of every weight go elsewhere while training goes on."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sylva_compile.blocks.block_mask import BlockMask
from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.embed import block_states
from sylva_compile.blocks.layout import update_input_channels
from sylva_compile.blocks.masks import Masks
from sylva_compile.blocks.moving import Carry, check_optimizers
from sylva_compile.config import SylvaConfig
from sylva_compile.errors import ArgumentError, EmbedError
from sylva_compile.kernels.gate import is_closed
from sylva_compile.schedules.choice import Cycle, sample, sample_columns
from sylva_compile.schedules.moving_options import FORMAT, Choose, Rounding, check_options, check_state
from sylva_compile.schedules.readers import groups_of_readers
from sylva_compile.schedules.scoring import FromGradients, FromTrace, Source
from sylva_compile.tracing.batches import LossFn

log = logging.getLogger(__name__)


class MovingBlocks:
    """Moves the blocks of every weight to other places, every few steps.

    Few blocks are trained at any time, and over many moves nearly all of a weight is. Time and memory are those of the
    few, but for the values from before training, which are kept on the CPU: at most one copy of the masked weights.

        schedule = sylva_compile.schedules.MovingBlocks(masks, every=8)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    Blocks whose layer a `LayerSchedule` has switched off stay where they are.

    Attributes:
        masks: the masks whose blocks move; they follow.
        steps: the number of calls of `step`.
        moves: the number of moves.
    """

    def __init__(
        self,
        masks: Masks,
        every: int = 8,
        choose: Choose = "random",
        seed: int = 0,
        *,
        temperature: float = 1.0,
        column_budget: float | None = None,
        carry: Carry = "none",
        rounding: Rounding = "nearest",
        optimizer: torch.optim.Optimizer | None = None,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        config: SylvaConfig | None = None,
    ) -> None:
        """Prepare the moves; with a column budget, blocks go inside it at once. Masks are embedded if need be.

        Args:
            masks: bound to the model.
            every: the number of steps between moves.
            choose: "random" draws all places alike. "cycle" takes every place once before any twice. "gradient" draws
                by the norm of each block in the weight gradient of the step before the move (the root of the sum of
                squares over its backward passes); compiled code computes it densely in that step, a weight at a time.
                "sketch" draws by an estimate of that norm, for which compiled code computes no dense gradient. "gain"
                draws by, and "greedy" takes by, the score of that name from a new trace for every move, which costs a
                pass over `config.num_samples` sequences, after which the compiled model is compiled again.
            seed: of the draws. All processes of a distributed training need the same.
            temperature: a place is drawn in proportion to its norm to the power of 1 / temperature. 0 takes the highest
                norms, which stops most places from ever being trained.
            column_budget: the share of a weight's input columns that its blocks may lie in, other ones after every
                move. Compiled code then saves that share of the activations; without it blocks read all of them. The
                weights of a layer that have one input width get the same columns. Weights that read one activation but
                have different numbers in their names do not.
            carry: "intersection" keeps the optimizer's states of blocks that stay; see `Masks.move`.
            rounding: of what a bfloat16 weight keeps of blocks that leave.
            optimizer: the optimizer of the blocks; without it, the one that stepped them last.
            loader: for "gain" and "greedy", the batches to trace, from the start for every move.
            loss_fn: for "gain" and "greedy"; see `trace_and_mask`.
            config: for "gain" and "greedy", the settings of the trace; None: those of `SylvaConfig`. Scope, sparsity
                and block size are those of the masks, and no checkpoint is written.

        Raises:
            ArgumentError: an option is out of its range, the columns have no room, or the optimizer does not fit.
        """
        check_options(masks, every, choose, temperature, column_budget, carry, rounding)
        self.masks, self.every, self.choose, self.temperature = masks, int(every), choose, float(temperature)
        self.column_budget, self.carry, self.rounding, self.optimizer = column_budget, carry, rounding, optimizer
        self.steps = self.moves = 0
        self._generator = torch.Generator("cpu").manual_seed(seed)
        model = masks.embed()
        self._states = {name: state for name, state in block_states(model).items() if name in masks}
        self._source = self._make_source(loader, loss_fn, config)
        self._cycles = {name: Cycle(mask.block_map().numel()) for name, mask in masks.items() if choose == "cycle"}
        self._groups = groups_of_readers(self._states)
        for name in self._states:
            self._check_room(name)
        check_optimizers(self._states.values(), optimizer, carry)
        if not all(map(self._lies_inside, self._groups.values())):
            masks.move(self._draw(list(self._states), {}), optimizer=optimizer)
        for state in self._states.values():
            state.layout.reserve(self._kept(state))
        update_input_channels(state.layout for state in block_states(model).values())
        masks.note(schedule=self._settings())
        self._listen()

    def step(self) -> None:
        """Count a step of the optimizer; move the blocks after every `every`-th. Call it after `optimizer.step()`.

        A move drops the gradients of the blocks, which the optimizer has used.
        """
        if self.carry != "none" and self.steps == 0:  # not only at the first move, which may be far away
            check_optimizers(self._states.values(), self.optimizer, self.carry)
        if (self.steps + 1) % self.every == 0:
            self.move()
        self.steps += 1
        self._listen()

    def move(self) -> None:
        """Move the blocks now, and drop their gradients.

        Raises:
            EmbedError: the model does not carry the blocks any more that this schedule was made for.
        """
        model = self.masks.model
        states = {} if model is None else block_states(model)
        if any(states.get(name) is not state for name, state in self._states.items()):
            raise EmbedError("The model carries other blocks now than when this schedule was made; make a new one.")
        names = [
            name
            for name, state in self._states.items()
            if state.blocks.requires_grad and not is_closed(state.layout.gate)
        ]
        for state in states.values():
            state.check_enabled()
        scores: dict[str, Tensor] = {}
        if self._source is not None:
            scores = self._source.take()
            names = [name for name in names if name in scores]
            if not names:
                log.warning("No block was scored, so none moves: no backward pass has reached the weights.")
                return
        for name in names:
            self._states[name].blocks.grad = None
        generator = self._generator if self.rounding == "stochastic" else None
        new = self._draw(names, scores)
        self.masks.move(new, optimizer=self.optimizer, carry=self.carry, generator=generator)
        self.moves += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beside the state dicts of model and optimizer.

        It is where blocks are and have been, their values, those from before training there, and the draws.
        """
        found = self.draws()
        for name, state in self._states.items():
            state.sync()
            found["weights"][name] |= {
                "positions": state.mask.positions.to(torch.int32),
                "blocks": state.whole_blocks().cpu().clone(),
                "places": state.originals.places.to(torch.int32),
                "originals": state.originals.values,
                **state.saved_left(),
                "outside": state.checksum_outside(state.originals.places),
            }
        return found

    def draws(self) -> dict[str, Any]:
        """Return the part of the state that draws depend on: all that an adapter of the same step does not hold."""
        cycles = {name: cycle.state_dict() for name, cycle in self._cycles.items()}
        return {
            "format": FORMAT,
            "settings": self._settings(),
            **{"steps": self.steps, "moves": self.moves},
            "generator": self._generator.get_state(),
            "weights": {name: {"cycle": cycles.get(name)} for name in self._states},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was made, with the blocks where they were then.

        The model's state dict may be loaded before it, or after it into a model of the same base.

        Raises:
            ArgumentError: it is of a schedule with other settings, of other weights, or of another base; nothing is
                changed then.
            EmbedError: the blocks have gradients.
        """
        check_state(state_dict, self._settings())
        generator = torch.Generator("cpu")
        generator.set_state(state_dict["generator"].cpu())
        self.masks.resume(state_dict["weights"])
        for name, cycle in self._cycles.items():
            cycle.load_state_dict(state_dict["weights"][name]["cycle"])
        self.steps, self.moves, self._generator = state_dict["steps"], state_dict["moves"], generator
        self.masks.note(moves=self.moves)
        if self._source is not None and self.choose in ("gradient", "sketch"):
            # What the model's passes have scored before belongs to another training.
            self._source.take()
        self._listen()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"MovingBlocks({settings}, steps={self.steps}, moves={self.moves})"

    def _settings(self) -> dict[str, Any]:
        names = ("every", "choose", "temperature", "column_budget", "carry", "rounding")
        return {name: getattr(self, name) for name in names}

    def _kept(self, state: BlockState) -> int:
        """Return the number of block columns of its input that a weight may use."""
        across = state.mask.block_map().shape[state.layout.input_axis]
        # The small term, as in SylvaConfig.blocks: 29% of 100 is 29 columns.
        return across if self.column_budget is None else max(1, int(self.column_budget * across + 1e-9))

    def _lies_inside(self, names: list[str]) -> bool:
        """Return whether the blocks of a layer's weights lie in as many columns as they may use."""
        states = [self._states[name] for name in names]
        columns = torch.cat([state.mask.positions[state.layout.input_axis] for state in states]).unique()
        return len(columns) <= self._kept(states[0])

    def _check_room(self, name: str) -> None:
        state = self._states[name]
        if self.column_budget is not None and state.layout.experts > 1 and state.layout.input_axis == 0:
            raise ArgumentError(f"{name} stores its experts transposed; leave column_budget out.")
        room = self._kept(state) * state.mask.block_map().shape[1 - state.layout.input_axis]
        if room < state.mask.nnz:
            raise ArgumentError(
                f"{name}: column_budget={self.column_budget} leaves room for {room} of its {state.mask.nnz} blocks; "
                "raise it, or train fewer blocks."
            )

    def _make_source(
        self, loader: Iterable[Any] | None, loss_fn: LossFn | None, config: SylvaConfig | None
    ) -> Source | None:
        """Return the source of the scores that `choose` needs, if any."""
        if self.choose in ("gradient", "sketch"):
            return FromGradients(self._states, sketch=self.choose == "sketch")
        if self.choose not in ("gain", "greedy"):
            return None
        if loader is None:
            raise ArgumentError(f"choose={self.choose!r} traces the model for every move; give a loader of batches.")
        sizes = {state.mask.block_size for state in self._states.values()}
        if len(sizes) > 1:
            raise ArgumentError(f"choose={self.choose!r} needs blocks of one size, and these have {sorted(sizes)}.")
        settings = replace(config or SylvaConfig(), score=self.choose, block_size=sizes.pop())
        return FromTrace(self.masks, self._states, loader, settings, loss_fn)

    def _listen(self) -> None:
        """Let the source of scores prepare before the last step before a move."""
        if self._source is not None and (self.steps + 1) % self.every == 0:
            self._source.listen()

    def _draw(self, names: list[str], scores: Mapping[str, Tensor]) -> dict[str, BlockMask]:
        """Choose new places for the blocks of `names`."""
        chosen = {}
        for group in self._groups.values():
            inside = [name for name in group if name in names]
            allowed = self._columns(inside, scores)
            for name in inside:
                chosen[name] = self._places(name, allowed, scores.get(name))
        return {name: chosen[name] for name in names}

    def _columns(self, names: list[str], scores: Mapping[str, Tensor]) -> Tensor | None:
        """Draw the input columns that the weights `names` of one layer may use; None for all of them."""
        if self.column_budget is None or not names:
            return None
        states = [self._states[name] for name in names]
        turned = []
        for name, state in zip(names, states, strict=True):
            score = scores.get(name, torch.ones(state.mask.block_map().shape, device="cpu"))
            turned.append(score if state.layout.input_axis == 1 else score.t())
        temperature = self.temperature if scores else math.inf
        counts = [state.mask.nnz for state in states]
        return sample_columns(turned, counts, self._kept(states[0]), temperature, self._generator)

    def _places(self, name: str, columns: Tensor | None, scores: Tensor | None) -> BlockMask:
        state = self._states[name]
        mask = state.mask
        allowed = torch.ones_like(mask.block_map())
        if columns is not None:
            allowed &= columns[None, :] if state.layout.input_axis == 1 else columns[:, None]
        choose = None if self._source is None else self._source.choose
        if name in self._cycles:
            chosen = self._cycles[name].take(mask.nnz, self._generator).view(allowed.shape)
        elif choose is not None and scores is not None:
            chosen = choose(name, mask.nnz, allowed)
        else:
            chosen = sample(scores, mask.nnz, allowed, self.temperature, self._generator)
        return BlockMask.from_block_map(chosen, mask.shape, mask.block_size)
