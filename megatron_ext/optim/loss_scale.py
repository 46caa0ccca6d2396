"""Dynamic loss scaling for float16, on the device: no step waits for the host to look at a gradient."""

import torch

from megatron_ext.optim.config import PrecisionConfig

_LARGEST = 2.0**127  # power of two in float32


class LossScaler:
    """Multiply the loss by `scale`; after each step say whether a gradient overflowed.

    As Megatron-LM's DynamicGradScaler: once `hysteresis` overflows have been seen, each one halves the scale (never
    below min_loss_scale); loss_scale_window good steps in a row double it (here never beyond float32) and restore the
    tolerance. With --loss-scale it is that, without fp16 it is 1, and stays. State: three float32 scalars.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device):
        self.config = config
        self.dynamic = config.scales_dynamically
        constant = 1.0 if config.loss_scale is None else config.loss_scale
        first = config.initial_loss_scale if self.dynamic else constant
        self.state = torch.tensor([first, 0.0, config.hysteresis], device=device)  # scale, good steps, tolerance
        self._origin = "as --initial-loss-scale says"

    @property
    def scale(self) -> torch.Tensor | float:
        return self.state[0] if self.config.fp16 else 1.0

    def resume(self, state: torch.Tensor, written: PrecisionConfig) -> None:
        """Go on from the state of a run with the flags `written`, as far as the flags of this run leave it to that.

        A dynamic scale goes on, with its good steps and its tolerance. It begins at initial_loss_scale where there was
        none, or where the flag says another value than it did then: leaving it out, or repeating a command, changes
        nothing. The other flags count at once.
        """
        changed = self.config.initial_loss_scale not in (written.initial_loss_scale, PrecisionConfig.initial_loss_scale)
        if not self.dynamic or not written.scales_dynamically or changed:
            return
        scale, good, tolerance = state
        self.state = torch.stack(
            [scale.clamp(min=self.config.min_loss_scale), good, tolerance.clamp(max=self.config.hysteresis)]
        )
        raised = float(scale) < self.config.min_loss_scale
        self._origin = "raised to --min-loss-scale" if raised else "as the checkpoint left it"

    def describe(self) -> str:
        """Where it stands before the first step; waits for the device."""
        return f"loss scale {float(self.scale):g}, " + (f"dynamic, {self._origin}" if self.dynamic else "constant")

    def update(self, found_inf: torch.Tensor) -> None:
        """found_inf: float32 scalar, 1 where this step's gradients were not finite."""
        if not self.dynamic:
            return
        scale, good, tolerance = self.state
        overflow = found_inf > 0
        good = torch.where(overflow, 0.0, good + 1)
        tolerance = torch.where(overflow, tolerance - 1, tolerance)
        shrink = overflow & (tolerance <= 0)
        grow = good >= self.config.loss_scale_window
        scale = torch.where(shrink, (scale / 2).clamp(min=self.config.min_loss_scale), scale)
        scale = torch.where(grow, (scale * 2).clamp(max=_LARGEST), scale)
        tolerance = torch.where(grow, float(self.config.hysteresis), tolerance)
        self.state = torch.stack([scale, torch.where(grow, 0.0, good), tolerance])
