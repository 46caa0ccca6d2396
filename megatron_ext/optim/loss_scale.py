"""Dynamic loss scaling for float16, on the device: no step waits for the host to look at a gradient."""

import torch

from megatron_ext.optim.config import PrecisionConfig


class LossScaler:
    """Multiply the loss by `scale`; after each step say whether a gradient overflowed.

    As in Megatron-LM: once `hysteresis` overflows have been seen, each one halves the scale (never below
    min_loss_scale); loss_scale_window good steps in a row double it and restore the tolerance. Without fp16 the
    scale is 1 and stays. State: three float32 scalars.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device):
        self.config = config
        self.dynamic = config.fp16 and config.loss_scale is None
        first = (config.loss_scale or config.initial_loss_scale) if config.fp16 else 1.0
        self.state = torch.tensor([first, 0.0, config.hysteresis], device=device)  # scale, good steps, tolerance

    @property
    def scale(self) -> torch.Tensor | float:
        return self.state[0] if self.config.fp16 else 1.0

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
        scale = torch.where(grow, scale * 2, scale)
        tolerance = torch.where(grow, float(self.config.hysteresis), tolerance)
        self.state = torch.stack([scale, torch.where(grow, 0.0, good), tolerance])
