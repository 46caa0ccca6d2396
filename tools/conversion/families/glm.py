"""GLM-4 9B (transformers' `glm`): half of every head is turned, by neighbours; gate and up are one matrix.

Source: modeling_glm.py.
"""

from typing import Any

from megatron_ext.models import ModelConfig
from tools.conversion.families.family import Family
from tools.conversion.families.llama import HEAD_DIM, LLAMA_ABSENT, LLAMA_FIELDS, LLAMA_RULES
from tools.conversion.rows import Rule

_GATE, _UP = "layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"


def _write_more(model: ModelConfig) -> dict[str, Any]:
    return {"attention_dropout": 0.0}


GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    fields=LLAMA_FIELDS | HEAD_DIM,
    rules=tuple(
        Rule("model.layers.{}.mlp.gate_up_proj.weight", (_GATE, _UP)) if rule.ours == (_GATE,) else rule
        for rule in LLAMA_RULES
        if rule.ours != (_UP,)
    ),
    absent=LLAMA_ABSENT
    | {
        "num_hidden_layers": 40,
        "intermediate_size": 13696,
        "vocab_size": 151552,
        "rms_norm_eps": 1.5625e-07,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
    },
    fixed={"add_qkv_bias": True, "rotary_interleaved": True},
    demanded={"hidden_act": "silu", "attention_bias": True},
    partial=True,
    write_more=_write_more,
)
