"""The built-in backend: torch's own fused operations, and the few that are better written anew."""

import torch
import torch.nn.functional as F

from megatron_ext.attention import Choice, Pattern, choose_attention
from megatron_ext.kernels.activation import ACTIVATIONS
from megatron_ext.kernels.backend import Activation, LinearCrossEntropy, Norm
from megatron_ext.kernels.cross_entropy import VocabParallelLinearCrossEntropy
from megatron_ext.kernels.linear import column_parallel_linear, row_parallel_linear, row_parallel_temporary
from megatron_ext.kernels.norm import NORMS


class TorchBackend:
    linear = staticmethod(F.linear)
    column_parallel = staticmethod(column_parallel_linear)
    row_parallel = staticmethod(row_parallel_linear)
    row_parallel_temporary = staticmethod(row_parallel_temporary)
    linear_cross_entropy: LinearCrossEntropy = VocabParallelLinearCrossEntropy()

    def __init__(self, attention_backend: str):
        """attention_backend: as `--attention-backend` names it."""
        self.attention_backend = attention_backend

    def norm(self, kind: str) -> Norm:
        return NORMS[kind]

    def activation(self, kind: str) -> Activation:
        return ACTIVATIONS[kind]

    def attention(
        self, pattern: Pattern, heads: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Choice:
        return choose_attention(self.attention_backend, pattern, heads, kv_heads, head_dim, device, dtype)
