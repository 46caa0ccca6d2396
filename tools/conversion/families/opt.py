"""OPT (transformers' `opt`): learned positions after two unused rows, ReLU, biases. Sources: modeling_opt.py, arXiv
2205.01068. OPT-350M, whose norms come last and whose embedding is narrower, is refused."""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.family import Family
from tools.conversion.rows import Rule

_LAYER = {
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "self_attn_layer_norm": "input_layernorm",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "final_layer_norm": "post_attention_layernorm",
}


def _read_more(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("word_embed_proj_dim") not in (None, config["hidden_size"]):
        raise RequestError(
            f"config.json: word_embed_proj_dim {config['word_embed_proj_dim']} of an opt model, other than its "
            f"hidden_size {config['hidden_size']}, is not supported"
        )
    return {}


def _write_more(model: ModelConfig) -> dict[str, Any]:
    return {"word_embed_proj_dim": model.hidden_size, "dropout": 0.0, "attention_dropout": 0.0}


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_dim": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "init_std": "init_method_std",
    },
    absent={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_attention_heads": 12,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    rules=(
        Rule("model.decoder.embed_tokens.weight", ("embed_tokens.weight",)),
        Rule("model.decoder.embed_positions.weight", ("embed_positions.weight",)),
        Rule("model.decoder.final_layer_norm.weight", ("norm.weight",)),
        Rule("model.decoder.final_layer_norm.bias", ("norm.bias",)),
        *(
            Rule(f"model.decoder.layers.{{}}.{theirs}.{kind}", (f"layers.{{}}.{ours}.{kind}",))
            for theirs, ours in _LAYER.items()
            for kind in ("weight", "bias")
        ),
        Rule("lm_head.weight", ("lm_head.weight",)),
    ),
    fixed={
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "activation": "relu",
        "position_embedding_type": "learned_absolute",
        "position_embedding_offset": 2,
        "add_bias_linear": True,
    },
    demanded={
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    rotary=False,
    read_more=_read_more,
    write_more=_write_more,
)
