"""Parameters and floating-point operations of a shape, for logs, plans and MFU.

Parameters are counted in the decoder itself, of which one layer is built without memory. A product of [m, k] and
[k, n] is 2mkn operations; backward costs twice the forward. Attention is reported in two conventions: `full` counts
all s x s scores (Narayanan et al., arXiv 2104.04473, appendix), `causal` half of them. Recomputation is never counted:
this is *model* FLOPs.
"""

import dataclasses
import functools

import torch

from megatron_ext.models.config import ModelConfig
from megatron_ext.models.decoder import parameter_shapes


@functools.lru_cache(maxsize=64)
def _one_layer(config: ModelConfig) -> tuple[tuple[torch.Size, ...], tuple[torch.Size, ...]]:
    """Shapes of a layer's parameters, and of all that are outside of layers."""
    shapes = parameter_shapes(dataclasses.replace(config, num_layers=1))
    inside = tuple(shape for name, shape in shapes.items() if name.startswith("layers."))
    outside = tuple(shape for name, shape in shapes.items() if not name.startswith("layers."))
    return inside, outside


def matmul_parameters_per_layer(config: ModelConfig) -> int:
    """Weights of a layer that are factors of a product with the tokens: not its biases and norms."""
    return sum(shape.numel() for shape in _one_layer(config)[0] if len(shape) == 2)


def parameters_per_layer(config: ModelConfig) -> int:
    return sum(shape.numel() for shape in _one_layer(config)[0])


def parameters(config: ModelConfig) -> int:
    """All parameters, tied embeddings once."""
    inside, outside = (sum(shape.numel() for shape in shapes) for shapes in _one_layer(config))
    return outside + config.num_layers * inside


def flops_per_token(
    config: ModelConfig, seq_length: int, causal: bool, trained: int | None = None, adapters: int = 0
) -> float:
    """Operations of forward and backward for one token in a sequence of `seq_length`.

    trained: weights in products that get a gradient (default: all; frozen ones cost 4 operations instead of 6, for
    the gradient still passes through). adapters: weights of adapters, which come on top of the model's.
    A sliding window of W tokens makes a sequence no longer than W for the scores, and `causal` counts them exactly.
    """
    weights = config.num_layers * matmul_parameters_per_layer(config) + config.vocab_size * config.hidden_size
    heads = config.num_layers * 2 * config.num_attention_heads * config.head_dim
    trained = weights if trained is None else trained
    return 4.0 * (weights + adapters) + 2.0 * trained + 6.0 * heads * _attended(config, seq_length, causal)


def _attended(config: ModelConfig, seq_length: int, causal: bool) -> float:
    """Mean number of keys that a query is compared with."""
    window = min(config.window_size or seq_length, seq_length)
    if not causal:
        return window
    return window - 0.5 * window * window / seq_length  # the first `window` queries see half of it on average
