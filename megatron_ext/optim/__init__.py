"""The optimizer step: parameter groups, clipping by the global norm, loss scaling, and the rate's schedule."""

from megatron_ext.optim.config import OptimizerConfig, PrecisionConfig
from megatron_ext.optim.loss_scale import LossScaler
from megatron_ext.optim.norm import squared_norms
from megatron_ext.optim.optimizer import MOMENTS, Optimizer, decays, placed_as
from megatron_ext.optim.rate import learning_rate
from megatron_ext.optim.states import States
from megatron_ext.optim.trainable import TrainableConfig

__all__ = [
    "MOMENTS",
    "LossScaler",
    "Optimizer",
    "OptimizerConfig",
    "PrecisionConfig",
    "States",
    "TrainableConfig",
    "decays",
    "learning_rate",
    "placed_as",
    "squared_norms",
]
