"""The norms of decoders, whose weights every tensor-parallel rank holds whole."""

import torch
from torch import nn

from megatron_ext.kernels import Kernels
from megatron_ext.models.config import ModelConfig
from megatron_ext.tensor_parallel import Replicated, TensorParallel
from megatron_ext.tensor_parallel.storage import local


class RMSNorm(Replicated):
    """Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, size: int, eps: float, tp: TensorParallel, kernels: Kernels, of_heads: bool = False):
        super().__init__(tp, of_heads)
        self.kernels, self.eps = kernels, eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, local(self.weight, x.dtype), self.eps)


class LayerNorm(Replicated):
    """Ba et al., arXiv 1607.06450."""

    def __init__(self, size: int, eps: float, tp: TensorParallel, kernels: Kernels, of_heads: bool = False):
        super().__init__(tp, of_heads)
        self.kernels, self.eps = kernels, eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.layer_norm(x, local(self.weight, x.dtype), local(self.bias, x.dtype), self.eps)


def make_norm(config: ModelConfig, tp: TensorParallel, kernels: Kernels, of_heads: bool = False) -> nn.Module:
    """The model's kind of norm over the hidden dimension, or over each of this rank's heads."""
    kind = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
    return kind(config.head_dim if of_heads else config.hidden_size, config.norm_epsilon, tp, kernels, of_heads)
