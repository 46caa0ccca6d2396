"""Qwen2 and Qwen2.5 (transformers' `qwen2`): LLaMA with biases on queries, keys and values.

Source: modeling_qwen2.py.
"""

from typing import Any

from megatron_ext.errors import RequestError
from tools.conversion.families.family import Family
from tools.conversion.families.llama import LLAMA_ABSENT, LLAMA_FIELDS, LLAMA_NULLABLE, LLAMA_RULES

QWEN_ABSENT = LLAMA_ABSENT | {
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}


def read_windows(config: dict[str, Any]) -> dict[str, Any]:
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise RequestError(f"config.json: layer_types {min(layer_types)!r} is not supported; 'full_attention' is")
    return {}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=LLAMA_FIELDS,
    rules=LLAMA_RULES,
    absent=QWEN_ABSENT,
    nullable=LLAMA_NULLABLE,
    fixed={"add_qkv_bias": True},
    demanded={"hidden_act": "silu", "use_sliding_window": False},
    read_more=read_windows,
)
