"""Self-attention, cut over the tensor-parallel group by heads."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.attention import Attend
from megatron_ext.kernels import Backend
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.norm import Norm
from megatron_ext.models.rotary import Rotation, rotate
from megatron_ext.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class Attention(nn.Module):
    """Self-attention with grouped key/value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend, recompute_core: bool):
        super().__init__()
        self.recompute_core = recompute_core
        self.head_dim = d = config.head_dim
        bias = config.add_qkv_bias or config.add_bias_linear
        kv_rows = None
        if config.kv_heads % tp.size:  # fewer KV heads than ranks: each rank uses the one its queries look at
            head = tp.rank * config.kv_heads // tp.size
            kv_rows = slice(head * d, (head + 1) * d)
        self.q_proj = ColumnParallelLinear(config.hidden_size, config.num_attention_heads * d, tp, kernels, bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, config.kv_heads * d, tp, kernels, bias, kv_rows)
        self.v_proj = ColumnParallelLinear(config.hidden_size, config.kv_heads * d, tp, kernels, bias, kv_rows)
        self.q_norm = Norm(config, tp, kernels, of_heads=True) if config.qk_layernorm else None
        self.k_norm = Norm(config, tp, kernels, of_heads=True) if config.qk_layernorm else None
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * d, config.hidden_size, tp, kernels, config.add_bias_linear
        )

    def forward(self, x: torch.Tensor, rope: Rotation | None, attend: Attend) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, this rank's heads, s, head_dim]
            for y in column_parallel(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.recompute_core and torch.is_grad_enabled():  # no random number is drawn in there
            heads = checkpoint(self._core, q, k, v, rope, attend, use_reentrant=False, preserve_rng_state=False)
        else:
            heads = self._core(q, k, v, rope, attend)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rotation | None, attend: Attend
    ) -> torch.Tensor:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return attend(q, k, v)
