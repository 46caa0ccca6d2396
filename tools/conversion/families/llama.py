"""LLaMA, Llama 2, Llama 3.x (transformers' `llama`), and the words that its relatives share with it.

Layouts are equal to ours, nothing is permuted. Sources: transformers' modeling_llama.py and config.json of the models.
"""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.family import Family
from tools.conversion.rows import Rule

LLAMA_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
}
HEAD_DIM = {"head_dim": "kv_channels"}
LLAMA_ABSENT = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA_NULLABLE = frozenset({"num_key_value_heads", "head_dim"})

_SAME = (
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.weight",
    "mlp.up_proj.bias",
    "mlp.down_proj.weight",
    "mlp.down_proj.bias",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
LLAMA_RULES = (
    Rule("model.embed_tokens.weight", ("embed_tokens.weight",)),
    *(Rule(f"model.layers.{{}}.{name}", (f"layers.{{}}.{name}",)) for name in _SAME),
    Rule("model.norm.weight", ("norm.weight",)),
    Rule("lm_head.weight", ("lm_head.weight",)),
)


def _read_biases(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("attention_bias", False) != config.get("mlp_bias", False):
        raise RequestError("config.json: attention_bias and mlp_bias differ, which is not supported")
    return {"add_bias_linear": config.get("mlp_bias", False)}


def _write_more(model: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    return biases | {"attention_dropout": 0.0}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=LLAMA_FIELDS | HEAD_DIM,
    rules=LLAMA_RULES,
    absent=LLAMA_ABSENT | {"intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 2048},
    nullable=LLAMA_NULLABLE,
    demanded={"hidden_act": "silu"},
    read_more=_read_biases,
    write_more=_write_more,
)
