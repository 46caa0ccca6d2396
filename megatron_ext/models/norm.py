"""The norms of decoders, whose weights every tensor-parallel rank holds whole."""

import torch
from torch import nn

from megatron_ext.kernels import Backend
from megatron_ext.models.config import ModelConfig
from megatron_ext.tensor_parallel import Replicated, TensorParallel
from megatron_ext.tensor_parallel.storage import local


class Norm(Replicated):
    """The model's kind of norm over the hidden dimension, or over each of this rank's heads."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend, of_heads: bool = False):
        super().__init__(tp, of_heads)
        size = config.head_dim if of_heads else config.hidden_size
        self.kernel, self.eps = kernels.norm(config.normalization), config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.normalization == "LayerNorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else local(self.bias, x.dtype)
        return self.kernel(x, local(self.weight, x.dtype), bias, self.eps)
