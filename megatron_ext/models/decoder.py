"""A LLaMA decoder that reads like single-device code.

It is written for one rank of a tensor-parallel group and one stage of a pipeline: `stage` says which layers, and
whether the embedding and the head, are here. Parameters are named as Hugging Face names them, layers by their
global index, so that neither a checkpoint nor a conversion knows the layout.
"""

import dataclasses

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.kernels import KernelConfig, Kernels, load_kernels
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.rotary import rotate, rotation
from megatron_ext.tensor_parallel import (
    ColumnParallelLinear,
    LoraConfig,
    Replicated,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    add_adapters,
    column_parallel,
    vocab_parallel_cross_entropy,
)

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """What of the model stands here: decoder layers [first, last), the embedding, the final norm and head."""

    first: int
    last: int
    has_embedding: bool
    has_head: bool


class RMSNorm(Replicated):
    """Zhang and Sennrich, arXiv 1910.07467."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels):
        super().__init__(tp)
        self.kernels = kernels
        self.eps = config.norm_epsilon
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.read(self.weight, x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads (arXiv 2305.13245)."""

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
        self.o_proj = RowParallelLinear(config.num_attention_heads * d, config.hidden_size, tp, config.add_bias_linear)

    def forward(self, x: torch.Tensor, rope: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
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
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rotation, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.kernels.attention(rotate(q, *rope), rotate(k, *rope), v, mask)


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        h, f, bias = config.hidden_size, config.ffn_hidden_size, config.add_bias_linear
        self.gate_proj = ColumnParallelLinear(h, f, tp, bias)
        self.up_proj = ColumnParallelLinear(h, f, tp, bias)
        self.down_proj = RowParallelLinear(f, h, tp, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.kernels.swiglu(*column_parallel(x, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels, recompute: str | None):
        super().__init__()
        self.recompute = recompute == "full"
        self.input_layernorm = RMSNorm(config, tp, kernels)
        self.self_attn = Attention(config, tp, kernels, recompute_core=recompute == "selective")
        self.post_attention_layernorm = RMSNorm(config, tp, kernels)
        self.mlp = MLP(config, tp, kernels)

    def forward(self, x: torch.Tensor, rope: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, rope, mask, use_reentrant=False)
        return self._layer(x, rope, mask)

    def _layer(self, x: torch.Tensor, rope: Rotation, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """One pipeline stage of the model (or all of it).

    dtype: what activations and products are computed in; parameters may be stored wider and are cast at use.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageSpec,
        tp: TensorParallel,
        kernels: Kernels,
        dtype: torch.dtype,
        recompute: str | None = None,
    ):
        super().__init__()
        self.config, self.stage, self.tp, self.dtype = config, stage, tp, dtype
        if stage.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(config, tp, kernels, recompute) for i in range(stage.first, stage.last)}
        )
        if stage.has_head:
            self.norm = RMSNorm(config, tp, kernels)
            self.lm_head = ColumnParallelLinear(config.hidden_size, config.vocab_size, tp)
            if config.tied and stage.has_embedding:
                self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One microbatch through this stage.

        x: token ids [b, s] on the first stage, else the previous stage's output [b, s, h] ([b, s/tp, h] under
        sequence parallelism). labels [b, s], loss_mask [b, s]: used on the last stage. document_ids [b, s]:
        attention stays within equal ids. position_ids [b, s]: positions other than 0..s-1.
        Returns hidden states; on the last stage the logits [b, s, V/tp], or with labels the mean loss over the
        (unmasked) tokens, shape [1].
        """
        if self.stage.has_embedding:
            x = self.embed_tokens(x, self.dtype)
            if not x.requires_grad and torch.is_grad_enabled() and not self.stage.has_head:
                x.requires_grad_()  # a schedule hands a gradient back over every boundary, needed or not
        length = x.shape[1] * (self.tp.size if self.tp.sequence_parallel else 1)
        positions = torch.arange(length, device=x.device) if position_ids is None else position_ids
        rope = rotation(self.config, positions, self.dtype)
        mask = None if document_ids is None else within_documents(document_ids)
        for layer in self.layers.values():
            x = layer(x, rope, mask)
        if not self.stage.has_head:
            return x
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return logits
        loss = vocab_parallel_cross_entropy(logits, labels, self.config.vocab_size, self.tp)
        if loss_mask is None:
            return loss.flatten().mean(0, keepdim=True)
        return (loss * loss_mask).flatten().sum(0, keepdim=True) / loss_mask.sum().clamp(min=1)


def whole_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """The undistributed model with plain parameters on the meta device: for conversion, checks and counting."""
    with torch.device("meta"):
        stage = StageSpec(0, config.num_layers, has_embedding=True, has_head=True)
        return Decoder(config, stage, TensorParallel(), load_kernels(KernelConfig()), dtype)


def parameter_shapes(config: ModelConfig, adapters: LoraConfig | None = None) -> dict[str, torch.Size]:
    """Global name -> shape of every parameter, in the model's order; a tied matrix once."""
    model = whole_model(config)
    if adapters is not None:
        add_adapters(model, adapters)
    return {name: param.shape for name, param in model.named_parameters()}


def within_documents(document_ids: torch.Tensor) -> torch.Tensor:
    """[b, s] -> bool [b, 1, s, s]: a token attends to earlier tokens of its own document and to itself."""
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]
