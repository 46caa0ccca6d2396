"""A decoder that reads like single-device code: LLaMA, and what its relatives do otherwise.

It is written for one rank of a tensor-parallel group and one stage of a pipeline: `stage` says which layers, and
whether the embedding and the head, are here. Parameters are named as Hugging Face names them, layers by their
global index, so that neither a checkpoint nor a conversion knows the layout.
"""

import dataclasses

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_ext.attention import Attend
from megatron_ext.kernels import Backend, KernelConfig, load_kernels
from megatron_ext.models.attention import Attention
from megatron_ext.models.attention_inputs import AttentionInputs
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.feed_forward import MLP
from megatron_ext.models.norm import Norm
from megatron_ext.models.rotary import Rotation
from megatron_ext.tensor_parallel import (
    ColumnParallelLinear,
    LoraConfig,
    PositionEmbedding,
    TensorParallel,
    VocabParallelEmbedding,
    add_adapters,
)


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """What of the model stands here: decoder layers [first, last), the embedding, the final norm and head."""

    first: int
    last: int
    has_embedding: bool
    has_head: bool


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend, recompute: str | None):
        super().__init__()
        self.recompute = recompute == "full"
        self.input_layernorm = Norm(config, tp, kernels)
        self.self_attn = Attention(config, tp, kernels, recompute_core=recompute == "selective")
        self.post_attention_layernorm = Norm(config, tp, kernels)
        self.mlp = MLP(config, tp, kernels)

    def forward(self, x: torch.Tensor, rope: Rotation | None, attend: Attend) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._layer, x, rope, attend, use_reentrant=False)
        return self._layer(x, rope, attend)

    def _layer(self, x: torch.Tensor, rope: Rotation | None, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelDecoderLayer(DecoderLayer):
    """Attention and feed-forward network read the same input, through one norm or through one each (Falcon)."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend, recompute: str | None):
        super().__init__(config, tp, kernels, recompute)
        if config.parallel_residual == "one-norm":
            del self.post_attention_layernorm

    def _layer(self, x: torch.Tensor, rope: Rotation | None, attend: Attend) -> torch.Tensor:
        normed = self.input_layernorm(x)
        other = self.post_attention_layernorm(x) if hasattr(self, "post_attention_layernorm") else normed
        return x + (self.mlp(other) + self.self_attn(normed, rope, attend))


class Head(ColumnParallelLinear):
    """Logits [b, s, V/tp] of hidden states, or with labels [b, s] every token's loss [b, s]."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Backend):
        super().__init__(config.hidden_size, config.vocab_size, tp, kernels)
        self.loss, self.vocab_size = kernels.linear_cross_entropy, config.vocab_size

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            return super().forward(x)
        return self.loss(x, self.local_weight(x.dtype), labels, self.vocab_size, self.tp)


class Decoder(nn.Module):
    """One pipeline stage of the model (or all of it).

    dtype: what activations and products are computed in; parameters may be stored wider and are cast at use.
    inputs: what the rank's stages share.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageSpec,
        tp: TensorParallel,
        kernels: Backend,
        dtype: torch.dtype,
        recompute: str | None = None,
        inputs: AttentionInputs | None = None,
    ):
        super().__init__()
        self.config, self.stage, self.tp, self.dtype = config, stage, tp, dtype
        self.inputs = inputs or AttentionInputs(config, tp, dtype, kernels)
        if stage.has_embedding:
            self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
            if config.position_embedding_type == "learned_absolute":
                table = config.max_position_embeddings, config.hidden_size, config.position_embedding_offset
                self.embed_positions = PositionEmbedding(*table, tp)
            if config.embed_layernorm:
                self.embed_layernorm = Norm(config, tp, kernels)
        layer = DecoderLayer if config.parallel_residual == "none" else ParallelDecoderLayer
        self.layers = nn.ModuleDict(
            {str(i): layer(config, tp, kernels, recompute) for i in range(stage.first, stage.last)}
        )
        if stage.has_head:
            self.norm = Norm(config, tp, kernels)
            self.lm_head = Head(config, tp, kernels)
            if config.tied and stage.has_embedding:
                self.lm_head.weight = self.embed_tokens.weight

    @property
    def embedding_modules(self) -> list[nn.Module]:
        """What makes hidden states of token ids here: the embedding, and what comes with it. Empty on later stages."""
        names = ("embed_tokens", "embed_positions", "embed_layernorm")
        return [getattr(self, name) for name in names if hasattr(self, name)]

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
        Returns hidden states; on the last stage the logits [b, s, V/tp], or with labels the sum of the tokens' losses,
        each times its loss_mask if there is one, shape [1].
        """
        cut = not self.stage.has_embedding and self.tp.sequence_parallel
        length = x.shape[1] * (self.tp.size if cut else 1)
        if self.stage.has_embedding:
            x = self._embed(x, self.inputs.positions(length, x.device) if position_ids is None else position_ids)
            if not x.requires_grad and torch.is_grad_enabled() and not self.stage.has_head:
                x.requires_grad_()  # a schedule hands a gradient back over every boundary, needed or not
        rope = self.inputs.rotation(length, position_ids, x.device)
        attend = self.inputs.attend(length, document_ids, x.device)
        for layer in self.layers.values():
            x = layer(x, rope, attend)
        if not self.stage.has_head:
            return x
        if labels is None:
            return self.lm_head(self.norm(x))
        loss = self.lm_head(self.norm(x), labels)
        return (loss if loss_mask is None else loss * loss_mask).flatten().sum(0, keepdim=True)

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids, self.dtype)
        if hasattr(self, "embed_positions"):
            x = x + self.embed_positions(positions, self.dtype)
        return self.embed_layernorm(x) if hasattr(self, "embed_layernorm") else x


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
