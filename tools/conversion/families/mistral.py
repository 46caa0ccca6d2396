"""Mistral 7B (transformers' `mistral`): LLaMA with a sliding window. Source: modeling_mistral.py; arXiv 2310.06825."""

from tools.conversion.families.family import Family
from tools.conversion.families.llama import HEAD_DIM, LLAMA_FIELDS, LLAMA_RULES

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA_FIELDS | HEAD_DIM | {"sliding_window": "window_size"},
    rules=LLAMA_RULES,
    absent={
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    demanded={"hidden_act": "silu"},
)
