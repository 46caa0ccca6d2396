"""The optimizer step: algorithms, parameter groups, clipping by the global norm, loss scaling, the rate's schedule."""

from megatron_ext.optim.algorithms import algorithm_named
from megatron_ext.optim.config import OptimizerConfig, PrecisionConfig
from megatron_ext.optim.groups import by_weight_decay, decays
from megatron_ext.optim.loss_scale import LossScaler
from megatron_ext.optim.norm import squared_norms
from megatron_ext.optim.optimizer import ShardedOptimizer
from megatron_ext.optim.rate import learning_rate
from megatron_ext.optim.states import States
from megatron_ext.optim.trainable import TrainableConfig

__all__ = [
    "LossScaler",
    "OptimizerConfig",
    "PrecisionConfig",
    "ShardedOptimizer",
    "States",
    "TrainableConfig",
    "algorithm_named",
    "by_weight_decay",
    "decays",
    "learning_rate",
    "squared_norms",
]
