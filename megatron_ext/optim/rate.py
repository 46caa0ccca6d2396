"""The learning rate as a function of the iteration alone, so that resuming needs no scheduler state."""

import math

from megatron_ext.optim.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Rate of optimizer step `iteration` (0-based), as Megatron-LM's OptimizerParamScheduler gives it.

    Linear warm-up from lr_warmup_init, which the first step uses; then the decay style down to min_lr at
    lr_decay_iters. WSD (Hu et al., arXiv 2404.06395): constant, then lr_wsd_decay_iters of decay.
    """
    peak, floor, warmup = config.lr, config.min_lr, config.lr_warmup_iters
    end = config.lr_decay_iters or train_iters
    if warmup > 0 and iteration <= warmup:
        return config.lr_warmup_init + (peak - config.lr_warmup_init) * iteration / warmup
    if config.lr_decay_style == "constant":
        return peak
    if iteration > end:
        return floor
    if config.lr_decay_style == "inverse-square-root":
        return max(floor, peak * math.sqrt(max(warmup, 1)) / math.sqrt(max(iteration, 1)))
    if config.lr_decay_style == "WSD":
        assert config.lr_wsd_decay_iters is not None
        start = end - config.lr_wsd_decay_iters
        if iteration <= start:
            return peak
        return floor + _wsd_share(config.lr_wsd_decay_style, (iteration - start) / config.lr_wsd_decay_iters) * (
            peak - floor
        )
    progress = (iteration - warmup) / (end - warmup)
    share = 1 - progress if config.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * progress) + 1)
    return floor + share * (peak - floor)


def _wsd_share(style: str, progress: float) -> float:
    """How much of peak - floor is left at `progress` in [0, 1] of the final decay."""
    if style == "linear":
        return 1 - progress
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * progress) + 1)
    if style == "exponential":
        return 2 * 0.5**progress - 1
    return 1 - math.sqrt(progress)
