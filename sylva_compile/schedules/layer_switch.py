"""Two ways to open and close layers for training."""

import weakref
from collections.abc import Collection
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from sylva_compile.blocks.block_state import BlockState
from sylva_compile.blocks.ddp import group_that_averages
from sylva_compile.kernels.gate import is_closed

Mechanism = Literal["toggle", "gate"]


class Switch(Protocol):
    """Opens and closes layers.

    Attributes:
        layers: the embedded weights of each layer.
    """

    layers: list[list[BlockState]]

    def open_only(self, layers: Collection[int]) -> None:
        """Train the blocks of `layers`, and drop the gradients of the others: an optimizer would step with them."""


class Toggle:
    """Sets `requires_grad` of the blocks; the backward pass ends at the lowest layer that is open."""

    def __init__(self, layers: list[list[BlockState]]) -> None:
        """Take the embedded weights of each layer."""
        self.layers = layers

    def open_only(self, layers: Collection[int]) -> None:
        """Open `layers` and close the others."""
        for layer, states in enumerate(self.layers):
            for state in states:
                # After an evaluation, the next pass reads blocks that `fully_shard` has gathered before.
                for blocks in (state.blocks, state.live_blocks):
                    blocks.requires_grad_(layer in layers)
                if layer not in layers:
                    state.blocks.grad = None


class Gate:
    """Sets a tensor of each layer that compiled graphs read when they run, so that one graph serves every draw.

    Products of closed layers are skipped. Their blocks still require grad and get a gradient of zero, which is dropped
    as soon as it has come, or when the optimizer's step begins.
    """

    def __init__(self, layers: list[list[BlockState]]) -> None:
        """Take the embedded weights of each layer, and give each layer a gate."""
        self.layers = layers
        self._gates = [torch.ones((), dtype=torch.bool, device="cpu") for _ in layers]
        self._hooked: weakref.WeakKeyDictionary[BlockState, nn.Parameter] = weakref.WeakKeyDictionary()
        for states, gate in zip(layers, self._gates, strict=True):
            for state in states:
                state.layout.gate = gate

    def open_only(self, layers: Collection[int]) -> None:
        """Open `layers` and close the others."""
        for layer, (states, gate) in enumerate(zip(self.layers, self._gates, strict=True)):
            # Without a write that changes nothing: autograd counts writes between a forward and a backward pass.
            if bool(gate) != (layer in layers):
                gate.fill_(layer in layers)
            for state in states:
                self._drop_when_closed(state)
                if layer not in layers:
                    state.blocks.grad = None

    def _drop_when_closed(self, state: BlockState) -> None:
        """Let gradients of zero be dropped; a move of the model may have given the blocks another Parameter."""
        if self._hooked.get(state) is state.blocks:
            return
        ref = weakref.ref(state)

        def drop(blocks: Tensor) -> None:
            # The gate that the weight has now: another schedule may have replaced this one's. Under
            # DistributedDataParallel, which with a static graph would take the blocks for unused ever after, zeros stay
            # until the optimizer's step begins.
            state = ref()
            if state is not None and is_closed(state.layout.gate) and group_that_averages([state]) is None:
                blocks.grad = None

        state.blocks.register_post_accumulate_grad_hook(drop)
        self._hooked[state] = state.blocks


def switch_of(mechanism: Mechanism, layers: list[list[BlockState]]) -> Switch:
    """Return the switch of that name."""
    return Toggle(layers) if mechanism == "toggle" else Gate(layers)
