"""The shape of a model, in Megatron-LM's words."""

import dataclasses
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.kernels.activation import ACTIVATIONS
from megatron_ext.option import check_types, flag_of, option, refuse_unused

_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: LLaMA's by default, or a relative's. Sizes are global; nothing here depends on the distribution."""

    num_layers: int = option(help="decoder layers")
    hidden_size: int = option(help="width of the residual stream")
    ffn_hidden_size: int = option(help="width of the feed-forward network")
    num_attention_heads: int = option(help="query heads")
    vocab_size: int = option(help="rows of the embedding, never padded (default: the tokenizer's pieces)")
    num_query_groups: int | None = option(None, "key/value heads (default: as many as query heads)")
    kv_channels: int | None = option(None, "size of a head (default: hidden size / query heads)")
    max_position_embeddings: int = option(2048, "longest sequence the model is meant for")
    rotary_base: float = option(10000.0, "theta of the rotary embedding")
    rope_scaling: str = option("none", "how long contexts stretch the rotation", choices=("none", "linear", "llama3"))
    rope_scaling_factor: float = option(1.0, "stretch of the context: new length / original length")
    rope_low_freq_factor: float = option(1.0, "llama3 scaling: wavelengths above original / this are stretched fully")
    rope_high_freq_factor: float = option(4.0, "llama3 scaling: wavelengths below original / this are left alone")
    rope_original_max_position: int = option(8192, "llama3 scaling: context length before stretching")
    norm_epsilon: float = option(1e-5, "added to the mean square, or the variance, in a norm")
    add_qkv_bias: bool = option(False, "biases on the query, key and value projections")
    add_bias_linear: bool = option(False, "biases on every linear layer of the decoder")
    untie_embeddings_and_output_weights: bool = option(True, "the output matrix is a parameter of its own")
    init_method_std: float = option(0.02, "standard deviation of the initial weights")
    # what LLaMA's relatives do otherwise
    normalization: str = option("RMSNorm", "kind of the norms", choices=("RMSNorm", "LayerNorm"))
    activation: str = option(
        "swiglu", "of the feed-forward network; all but swiglu are without a gate", choices=tuple(ACTIVATIONS)
    )
    position_embedding_type: str = option(
        "rope", "how tokens know their positions", choices=("rope", "alibi", "learned_absolute")
    )
    position_embedding_offset: int = option(0, "learned_absolute: rows of the table before position 0's (OPT has 2)")
    rotary_percent: float = option(1.0, "share of every head that the rotary embedding turns")
    rotary_interleaved: bool = option(False, "rotary embedding turns neighbours, not the halves of a head")
    window_size: int | None = option(None, "tokens that a token attends to, itself included (default: all before it)")
    qk_layernorm: bool = option(False, "a norm over every head of the queries and keys")
    embed_layernorm: bool = option(False, "a norm after the embedding")
    parallel_residual: str = option(
        "none",
        "attention and feed-forward network read the same input, through one norm or one each",
        choices=("none", "one-norm", "two-norms"),
    )

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading elements of a head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_percent)

    def resolved(self) -> "ModelConfig":
        """The same model with the head size and the number of KV heads spelled out, and what has no effect at rest."""
        idle: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(self) if field.name in self.idle()
        }
        return dataclasses.replace(self, kv_channels=self.head_dim, num_query_groups=self.kv_heads, **idle)

    def idle(self) -> tuple[str, ...]:
        """Names of the fields that have no effect, given the others."""
        idle: tuple[str, ...] = ()
        if self.position_embedding_type != "rope":
            idle += ("rotary_base", "rotary_percent", "rotary_interleaved", "rope_scaling", "rope_scaling_factor")
        elif self.rope_scaling == "none":
            idle += ("rope_scaling_factor",)
        if self.position_embedding_type != "rope" or self.rope_scaling != "llama3":
            idle += ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position")
        return idle

    @property
    def tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights

    def validate(self) -> None:
        """Raise RequestError where the numbers do not make a model."""
        check_types(self)  # first: what comes after computes with them
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
        lengths = ("max_position_embeddings", "rope_original_max_position", "window_size")
        for name in (*sizes, "num_query_groups", "kv_channels", *lengths):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{flag_of(name)} {value}: must be at least 1")
        if self.num_layers > _MOST_LAYERS:
            raise RequestError(f"--num-layers {self.num_layers}: must be at most {_MOST_LAYERS}")
        for name in ("norm_epsilon", "rotary_base", "rope_scaling_factor", "init_method_std"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{flag_of(name)} {getattr(self, name)}: must be above 0")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise RequestError(
                f"--hidden-size {self.hidden_size} is not a multiple of --num-attention-heads "
                f"{self.num_attention_heads}: change one, or give the head size with --kv-channels"
            )
        if self.num_attention_heads % self.kv_heads:
            raise RequestError(
                f"--num-query-groups {self.kv_heads} does not divide --num-attention-heads {self.num_attention_heads}"
            )
        self._validate_positions()

    def _validate_positions(self) -> None:
        if self.position_embedding_type != "learned_absolute":
            refuse_unused(self, ("position_embedding_offset",), "--position-embedding-type learned_absolute")
        elif self.position_embedding_offset < 0:
            raise RequestError(f"--position-embedding-offset {self.position_embedding_offset}: must not be negative")
        if self.position_embedding_type != "rope":
            unused = ("rotary_percent", "rotary_interleaved", "rope_scaling", "rope_scaling_factor")
            refuse_unused(self, unused, "--position-embedding-type rope")
            return
        if self.rope_scaling == "none":
            refuse_unused(self, ("rope_scaling_factor",), "--rope-scaling linear or llama3")
        elif self.rope_scaling == "linear" and self.rope_scaling_factor == 1:
            raise RequestError("--rope-scaling linear has no effect with --rope-scaling-factor 1: give the factor")
        elif self.rope_scaling == "llama3" and not 0 < self.rope_low_freq_factor < self.rope_high_freq_factor:
            raise RequestError(
                f"--rope-low-freq-factor {self.rope_low_freq_factor}: must be above 0 and below "
                f"--rope-high-freq-factor {self.rope_high_freq_factor}"
            )
        if not 0 < self.rotary_percent <= 1:
            raise RequestError(f"--rotary-percent {self.rotary_percent}: must be above 0 and at most 1")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            share = "" if self.rotary_percent == 1 else f" x --rotary-percent {self.rotary_percent} = {self.rotary_dim}"
            raise RequestError(
                f"head size {self.head_dim}{share} is odd or none, and rotary embedding turns pairs: use an even one"
            )

    def validate_length(self, seq_length: int) -> None:
        """Raise RequestError where sequences are longer than the model is meant for."""
        if seq_length > self.max_position_embeddings:
            raise RequestError(
                f"--seq-length {seq_length} is longer than --max-position-embeddings {self.max_position_embeddings}: "
                "raise the latter too if the model is to learn it"
            )

    def validate_tensor_parallel(self, tp: int, sequence_parallel: bool, seq_length: int) -> None:
        """Raise RequestError where `tp` ranks cannot share this model's layers evenly."""

        def refuse(what: str, value: int) -> None:
            raise RequestError(f"{what} {value} is not divisible by --tensor-model-parallel-size {tp}")

        if self.num_attention_heads % tp:
            refuse("--num-attention-heads", self.num_attention_heads)
        if self.kv_heads % tp and tp % self.kv_heads:
            raise RequestError(
                f"--num-query-groups {self.kv_heads} neither divides nor is divided by "
                f"--tensor-model-parallel-size {tp}"
            )
        if self.ffn_hidden_size % tp:
            refuse("--ffn-hidden-size", self.ffn_hidden_size)
        if sequence_parallel and seq_length % tp:
            refuse("--seq-length (with --sequence-parallel)", seq_length)
        if (tp - 1) * -(-self.vocab_size // tp) >= self.vocab_size:
            raise RequestError(
                f"--vocab-size {self.vocab_size} leaves a rank without a row at --tensor-model-parallel-size {tp}"
            )
