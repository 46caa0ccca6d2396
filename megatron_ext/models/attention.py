"""Self-attention, cut over the tensor-parallel group by heads, and what a token may attend to."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.kernels import Kernels
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.norm import make_norm
from megatron_ext.models.rotary import Rotation, rotate
from megatron_ext.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels, recompute_core: bool):
        super().__init__()
        self.kernels, self.recompute_core = kernels, recompute_core
        self.head_dim = d = config.head_dim
        bias = config.add_qkv_bias or config.add_bias_linear
        kv_rows = None
        if config.kv_heads % tp.size:  # fewer KV heads than ranks: each rank uses the one its queries look at
            head = tp.rank * config.kv_heads // tp.size
            kv_rows = slice(head * d, (head + 1) * d)
        self.q_proj = ColumnParallelLinear(config.hidden_size, config.num_attention_heads * d, tp, bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, config.kv_heads * d, tp, bias, rows=kv_rows)
        self.v_proj = ColumnParallelLinear(config.hidden_size, config.kv_heads * d, tp, bias, rows=kv_rows)
        self.q_norm = make_norm(config, tp, kernels, of_heads=True) if config.qk_layernorm else None
        self.k_norm = make_norm(config, tp, kernels, of_heads=True) if config.qk_layernorm else None
        self.o_proj = RowParallelLinear(config.num_attention_heads * d, config.hidden_size, tp, config.add_bias_linear)

    def forward(self, x: torch.Tensor, rope: Rotation | None, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, this rank's heads, s, head_dim]
            for y in column_parallel(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.recompute_core and torch.is_grad_enabled():  # no random number is drawn in there
            heads = checkpoint(self._core, q, k, v, rope, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            heads = self._core(q, k, v, rope, mask)
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def _core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rotation | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.kernels.attention(q, k, v, mask)


def attention_mask(
    config: ModelConfig,
    tp: TensorParallel,
    length: int,
    document_ids: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """What is to be added to the causal order: nothing (None), or who may attend to whom, or by how much.

    document_ids [b, s]: a token attends to earlier tokens of its own document and to itself.
    Returns bool [b or 1, 1, s, s], True: may attend; with ALiBi what is added to the scores, [b or 1, this rank's
    heads, s, s] in `dtype`.
    """
    windowed = config.window_size is not None and config.window_size < length
    alibi = config.position_embedding_type == "alibi"
    if document_ids is None and not windowed and not alibi:
        return None
    index = torch.arange(length, device=device)
    behind = index[:, None] - index[None, :]  # how far the key lies behind the query
    allowed = (behind >= 0)[None]
    if windowed:
        assert config.window_size is not None
        allowed = allowed & (behind < config.window_size)
    if document_ids is not None:
        allowed = allowed & (document_ids[:, :, None] == document_ids[:, None, :])
    if not alibi:
        return allowed[:, None]
    heads = config.num_attention_heads // tp.size
    slopes = alibi_slopes(config.num_attention_heads)[tp.rank * heads : (tp.rank + 1) * heads].to(device)
    bias = (-slopes[:, None, None] * behind).to(dtype)
    return bias.masked_fill(~allowed[:, None], -torch.inf)


def alibi_slopes(heads: int) -> torch.Tensor:
    """Of every head, float32 [heads] (Press et al., arXiv 2108.12409, section 3; its code for other than powers of 2).

    A geometric sequence for the largest power of two, then every other term of the sequence for twice as many.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
