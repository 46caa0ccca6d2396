"""Parameters and floating-point operations of a shape, for logs, plans and MFU.

A product of [m, k] and [k, n] is 2mkn operations; backward costs twice the forward. Attention is reported in two
conventions: `full` counts all s x s scores (Narayanan et al., arXiv 2104.04473, appendix), `causal` half of them.
Recomputation is never counted: this is *model* FLOPs.
"""

from megatron_ext.models.config import ModelConfig


def matmul_parameters_per_layer(config: ModelConfig) -> int:
    h, d = config.hidden_size, config.head_dim
    attention = h * d * (2 * config.num_attention_heads + 2 * config.kv_heads)
    return attention + 3 * h * config.ffn_hidden_size


def parameters_per_layer(config: ModelConfig) -> int:
    h, d = config.hidden_size, config.head_dim
    biases = 0
    if config.add_qkv_bias or config.add_bias_linear:
        biases += d * (config.num_attention_heads + 2 * config.kv_heads)
    if config.add_bias_linear:
        biases += 2 * config.ffn_hidden_size + 2 * h
    return matmul_parameters_per_layer(config) + biases + 2 * h


def parameters(config: ModelConfig) -> int:
    """All parameters, tied embeddings once."""
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    return vocabulary + config.num_layers * parameters_per_layer(config) + config.hidden_size


def flops_per_token(
    config: ModelConfig, seq_length: int, causal: bool, trained: int | None = None, adapters: int = 0
) -> float:
    """Operations of forward and backward for one token in a sequence of `seq_length`.

    trained: weights in products that get a gradient (default: all; frozen ones cost 4 operations instead of 6, for
    the gradient still passes through). adapters: weights of adapters, which come on top of the model's.
    """
    weights = config.num_layers * matmul_parameters_per_layer(config) + config.vocab_size * config.hidden_size
    scores = config.num_layers * 2 * seq_length * config.num_attention_heads * config.head_dim
    trained = weights if trained is None else trained
    return 4.0 * (weights + adapters) + 2.0 * trained + 6.0 * scores * (0.5 if causal else 1.0)
