"""The feed-forward network of a decoder layer, cut over the tensor-parallel group by its inner features."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_ext.kernels import Kernels
from megatron_ext.models.config import ModelConfig
from megatron_ext.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        h, f, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.gate_proj = ColumnParallelLinear(h, f, tp, bias)
        self.up_proj = ColumnParallelLinear(h, f, tp, bias)
        self.down_proj = RowParallelLinear(f, h, tp, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.swiglu(*column_parallel(x, self.gate_proj, self.up_proj)))


class MLP(nn.Module):
    """Without a gate."""

    def __init__(self, config: ModelConfig, tp: TensorParallel):
        super().__init__()
        h, f, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.activation = _PLAIN[config.activation]
        self.up_proj = ColumnParallelLinear(h, f, tp, bias)
        self.down_proj = RowParallelLinear(f, h, tp, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def make_mlp(config: ModelConfig, tp: TensorParallel, kernels: Kernels) -> nn.Module:
    return GatedMLP(config, tp, kernels) if config.activation == "swiglu" else MLP(config, tp)
