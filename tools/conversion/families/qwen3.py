"""Qwen3 (transformers' `qwen3`): LLaMA with a norm over every query and key head. Source: modeling_qwen3.py."""

from tools.conversion.families.family import Family
from tools.conversion.families.llama import HEAD_DIM, LLAMA_FIELDS, LLAMA_NULLABLE, LLAMA_RULES
from tools.conversion.families.qwen2 import QWEN_ABSENT, read_windows

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=LLAMA_FIELDS | HEAD_DIM,
    rules=LLAMA_RULES,
    absent=QWEN_ABSENT | {"head_dim": 128},
    nullable=LLAMA_NULLABLE - {"head_dim"},
    fixed={"qk_layernorm": True},
    demanded={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    read_more=read_windows,
)
