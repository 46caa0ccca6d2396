"""What an engine of ZeRO is to the rest: pipeline stages that train, and an optimizer that updates them."""

from typing import Protocol

import torch
from torch import nn

from megatron_ext.footprint import ModelStates
from megatron_ext.models import Decoder
from megatron_ext.optim import States


class DataParallelStage(Protocol):
    """A pipeline stage whose parameters and gradients are spread over data-parallel ranks.

    module: what to call for a forward pass. averaged_over: data-parallel ranks whose gradients are averaged; 1 where
    they are summed.
    """

    decoder: Decoder
    module: nn.Module
    averaged_over: int

    def begin(self) -> None:
        """Start a step, or an evaluation: what parameters are now they stay until it is over."""

    def backward(self, output: torch.Tensor, grad: torch.Tensor | None, last: bool) -> None:
        """Run a microbatch's whole backward pass. last: of the step. grad: None where `output` is the loss."""

    def before_backward(self, kind: str, last: bool) -> None:
        """Get ready for a backward pass that somebody else runs: "full", its "input" or its "weight" half."""

    def after_backward(self, kind: str, last: bool) -> None:
        """Accumulate or reduce what the backward pass just finished leaves to be done."""

    def reshard(self) -> None:
        """Give back gathered parameters after a pass without backward: they go stale at the next optimizer step."""


class Optimizer(Protocol):
    """The optimizer of all parameters of a rank. Collective throughout."""

    def update(
        self, sums: torch.Tensor, lr: float, loss_scale: torch.Tensor | float, measure: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take an optimizer step with the gradients there are, and sum `sums` over the world.

        sums: float64 [n], this rank's shares. loss_scale: what the gradients are too large by. measure: note what the
        gradients take, for `model_states`.
        Returns the totals, the norm of the whole model's gradient before clipping (float64), and float32 1 if the
        step was skipped for a gradient that is not finite; all on the device, equal on every rank.
        """

    @property
    def step_count(self) -> torch.Tensor:
        """Optimizer steps taken, float32 scalar."""

    def set_step_count(self, steps: torch.Tensor) -> None:
        """Go on as after so many steps."""

    def state_dict(self, empty: bool = False) -> States:
        """All weights and optimizer states; `empty`: the values do not matter, they will be written over."""

    def load_state_dict(self, states: States) -> None:
        """Go on from these states, which `state_dict` gave and a checkpoint filled."""

    def model_states(self) -> ModelStates:
        """Bytes that this rank holds: weights and optimizer states now, gradients as the last update found them that
        measured (none yet: 0)."""
