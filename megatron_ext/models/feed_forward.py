"""The feed-forward network of a decoder layer, cut over the tensor-parallel group by its inner features."""

import torch
from torch import nn

from megatron_ext.kernels import Backend
from megatron_ext.models.config import ModelConfig
from megatron_ext.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class MLP(nn.Module):
    """With a gate (SwiGLU), or without."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend):
        super().__init__()
        h, f, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = kernels.activation(config.activation)
        self.gate_proj = ColumnParallelLinear(h, f, tp, kernels, bias) if self.activation.inputs == 2 else None
        self.up_proj = ColumnParallelLinear(h, f, tp, kernels, bias)
        self.down_proj = RowParallelLinear(f, h, tp, kernels, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        into = [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]
        return self.down_proj(self.activation(*column_parallel(x, *into)))
