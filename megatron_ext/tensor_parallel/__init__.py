"""Megatron-style tensor and sequence parallelism on plain local tensors (arXiv 1909.08053, 2205.05198).

Parameters are *stored* as DTensors on the tp mesh, so every parameter says how it is sharded; computation
reads their local tensors and calls the collectives here.
"""

from megatron_ext.tensor_parallel.context import TensorParallel
from megatron_ext.tensor_parallel.layers import (
    ColumnParallelLinear,
    PositionEmbedding,
    Products,
    Replicated,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
)
from megatron_ext.tensor_parallel.lora import LoraConfig, adapter_product, add_adapters
from megatron_ext.tensor_parallel.storage import (
    distribute_parameters,
    gradient_of,
    localize_parameters,
    shares_of_gradients,
    tp_shard_range,
)

__all__ = [
    "ColumnParallelLinear",
    "LoraConfig",
    "PositionEmbedding",
    "Products",
    "Replicated",
    "RowParallelLinear",
    "TensorParallel",
    "VocabParallelEmbedding",
    "adapter_product",
    "add_adapters",
    "column_parallel",
    "distribute_parameters",
    "gradient_of",
    "localize_parameters",
    "shares_of_gradients",
    "tp_shard_range",
]
