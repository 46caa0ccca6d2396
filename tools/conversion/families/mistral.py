"""Mistral 7B (transformers' `mistral`): LLaMA with a sliding window. Source: modeling_mistral.py; arXiv 2310.06825."""

from tools.conversion.families.family import Family
from tools.conversion.families.llama import HEAD_DIM, LLAMA_ABSENT, LLAMA_FIELDS, LLAMA_RULES

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA_FIELDS | HEAD_DIM | {"sliding_window": "window_size"},
    rules=LLAMA_RULES,
    absent=LLAMA_ABSENT
    | {
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    demanded={"hidden_act": "silu"},
)
