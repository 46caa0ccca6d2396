"""GPT-2 (transformers' `gpt2`): learned positions, GELU by tanh, biases, tied; matrices stored as [in, out], query, key
and value in one of them. Sources: modeling_gpt2.py; Radford et al. 2019, section 2.3."""

from typing import Any

from megatron_ext.models import ModelConfig
from tools.conversion.families.family import Family
from tools.conversion.rows import Rule

_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_MATRICES = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def _read_more(config: dict[str, Any]) -> dict[str, Any]:
    return {"ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"]}


def _write_more(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_inner": None if model.ffn_hidden_size == 4 * model.hidden_size else model.ffn_hidden_size,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_method_std",
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    absent={
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    rules=(
        Rule("transformer.wte.weight", ("embed_tokens.weight",)),
        Rule("transformer.wpe.weight", ("embed_positions.weight",)),
        *(
            Rule(f"transformer.h.{{}}.{theirs}.{kind}", (f"layers.{{}}.{ours}.{kind}",))
            for theirs, ours in _NORMS.items()
            for kind in ("weight", "bias")
        ),
        *(
            Rule(
                f"transformer.h.{{}}.{theirs}.{kind}",
                tuple(f"layers.{{}}.{name}.{kind}" for name in ours),
                transposed=kind == "weight",
            )
            for theirs, ours in _MATRICES.items()
            for kind in ("weight", "bias")
        ),
        Rule("transformer.ln_f.weight", ("norm.weight",)),
        Rule("transformer.ln_f.bias", ("norm.bias",)),
        Rule("lm_head.weight", ("lm_head.weight",)),
    ),
    fixed={
        "normalization": "LayerNorm",
        "activation": "gelu-tanh",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
    },
    demanded={
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    rotary=False,
    read_more=_read_more,
    write_more=_write_more,
    optional_prefix="transformer.",
    derived=(".attn.bias", ".attn.masked_bias"),
)
