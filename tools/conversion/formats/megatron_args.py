"""A model's shape in the words of Megatron-LM's arguments, which its checkpoints carry.

Sources: Megatron-LM's arguments.py, its core_transformer_config_from_args, and megatron-core's TransformerConfig and
GPTModel.
"""

import argparse
import dataclasses
import numbers
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.rope import ROPE_FIELDS

# arguments that are called like ModelConfig's fields, and mean the same
_NEEDED = {
    "num_layers": int,
    "hidden_size": int,
    "ffn_hidden_size": int,
    "num_attention_heads": int,
    "max_position_embeddings": int,
    "position_embedding_type": str,
    "normalization": str,
    "norm_epsilon": float,
    "add_bias_linear": bool,
    "untie_embeddings_and_output_weights": bool,
}
_OPTIONAL = {"kv_channels": int, "add_qkv_bias": bool, "qk_layernorm": bool, "init_method_std": float}
_ROTARY = {"rotary_base": float, "rotary_percent": float, "rotary_interleaved": bool}
# arguments that make another model of tensors of the same names and shapes, unless they are unset, off or zero
_FOREIGN = (
    "activation_func_clamp_value",
    "apply_layernorm_1p",
    "apply_residual_connection_post_layernorm",
    "glu_linear_offset",
    "layernorm_zero_centered_gamma",
    "multi_latent_attention",
    "no_rope_freq",
    "num_experts",
    "qk_l2_norm",
    "quick_geglu",
    "softmax_scale",
    "squared_relu",
    "window_attn_skip_freq",
)
_LLAMA3 = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_position": 8192}


def to_args(model: ModelConfig) -> argparse.Namespace:
    """Make the arguments of `model`, of one rank. Raises RequestError where megatron-core has no word for it.

    padded_vocab_size is left to the program that loads: it pads for its own layout, and would take ours for padded.
    """
    model = model.resolved()
    args = argparse.Namespace(**{name: getattr(model, name) for name in (*_NEEDED, *_OPTIONAL, *_ROTARY)})
    args.rotary_base = int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base
    args.vocab_size, args.padded_vocab_size = model.vocab_size, None
    args.group_query_attention = model.kv_heads != model.num_attention_heads
    args.num_query_groups = model.kv_heads
    args.swiglu, args.squared_relu = model.activation == "swiglu", False
    args.bias_gelu_fusion = model.activation == "gelu-tanh"  # that kernel approximates, the layer without it does not
    args.use_rotary_position_embeddings = model.position_embedding_type == "rope"
    args.add_position_embedding = True
    args.use_rope_scaling = model.rope_scaling == "llama3"
    args.rope_scaling_factor = model.rope_scaling_factor if args.use_rope_scaling else 8.0
    args.rotary_seq_len_interpolation_factor = model.rope_scaling_factor if model.rope_scaling == "linear" else None
    args.window_size = None if model.window_size is None else (model.window_size - 1, 0)
    args.attention_dropout = args.hidden_dropout = 0.0
    args.apply_layernorm_1p = args.apply_query_key_layer_scaling = False
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    args.ckpt_format = "torch_dist"
    _check_understood(args, model)
    return args


def _check_understood(args: argparse.Namespace, model: ModelConfig) -> None:
    try:
        understood = dataclasses.asdict(from_args(args, model.vocab_size).resolved())
    except RequestError as error:
        raise RequestError(f"megatron-core cannot have this model: {error}") from error
    unused: set[str] = set() if model.rope_scaling == "llama3" else set(ROPE_FIELDS)
    if model.position_embedding_type != "rope":
        unused |= _ROTARY.keys()
    for name, value in dataclasses.asdict(model).items():
        if understood[name] != value and name not in unused:
            raise RequestError(f"megatron-core cannot have a model of {name} {value} (it would be {understood[name]})")


def from_args(args: argparse.Namespace, vocab_size: int) -> ModelConfig:
    """Read the shape that a checkpoint's arguments describe. Raises RequestError for what is missing or unsupported."""
    for name in _FOREIGN:
        if getattr(args, name, None):
            raise RequestError(f"args.{name} {getattr(args, name)!r} is not supported")
    if getattr(args, "softmax_type", "vanilla") != "vanilla":
        raise RequestError(f"args.softmax_type {args.softmax_type!r} is not supported; 'vanilla' is")
    values = {name: _value(args, name, kind) for name, kind in (_NEEDED | _OPTIONAL).items()}
    missing = [name for name in _NEEDED if values[name] is None]
    if missing:
        raise RequestError(f"args lacks {', '.join(missing)}")
    if values["position_embedding_type"] == "rope":
        values |= {name: _value(args, name, kind) for name, kind in _ROTARY.items()} | _scaling(args)
    elif values["position_embedding_type"] != "learned_absolute":
        name = "position_embedding_type"
        raise RequestError(f"args.{name} {values[name]!r} is not supported; 'rope' and 'learned_absolute' are")
    if _value(args, "group_query_attention", bool):
        values["num_query_groups"] = _value(args, "num_query_groups", int)
    values["activation"] = _activation(args)
    values["window_size"] = _window(args)
    given = {name: value for name, value in values.items() if value is not None}
    model = ModelConfig(**given, vocab_size=vocab_size)
    if model.normalization not in ("RMSNorm", "LayerNorm"):
        raise RequestError(f"args.normalization {model.normalization!r} is not supported; 'RMSNorm', 'LayerNorm' are")
    model.validate()
    return model


def _value(args: argparse.Namespace, name: str, kind: type) -> Any:
    """An argument as `kind`, or None where it is absent."""
    value = getattr(args, name, None)
    if value is None:
        return None
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise RequestError(f"args.{name} is {value!r}, which is not of type {kind.__name__}")
    return value


def _activation(args: argparse.Namespace) -> str:
    if _value(args, "swiglu", bool):
        return "swiglu"
    fused = _value(args, "bias_gelu_fusion", bool) and args.add_bias_linear
    return "gelu-tanh" if fused else "gelu"


def _scaling(args: argparse.Namespace) -> dict[str, Any]:
    llama3 = _value(args, "use_rope_scaling", bool)
    linear = _value(args, "rotary_seq_len_interpolation_factor", float)
    if llama3 and linear:
        raise RequestError("args has both use_rope_scaling and rotary_seq_len_interpolation_factor; one is supported")
    if llama3:
        factor = _value(args, "rope_scaling_factor", float) or 8.0
        return {"rope_scaling": "llama3", "rope_scaling_factor": factor} | _LLAMA3
    return {"rope_scaling": "linear", "rope_scaling_factor": linear} if linear not in (None, 0, 1) else {}


def _window(args: argparse.Namespace) -> int | None:
    """Megatron's is (tokens before, tokens after), a token itself not counted; -1 before: all."""
    window = getattr(args, "window_size", None)
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2 or type(window[0]) is not int or window[1] != 0:
        raise RequestError(f"args.window_size {window!r} is not supported; (tokens before, 0) is")
    return window[0] + 1 if window[0] >= 0 else None
