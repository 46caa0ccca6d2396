"""transformers' LLaMA with given weights: an oracle that nobody here wrote."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_ext.models import ModelConfig


def llama_config(config: ModelConfig) -> LlamaConfig:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
    if config.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_max_position,
        }
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.norm_epsilon,
        attention_bias=config.add_bias_linear,
        mlp_bias=config.add_bias_linear,
        tie_word_embeddings=config.tied,
        rope_parameters=rope,
    )


def hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def llama_like(config: ModelConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """LlamaForCausalLM with our weights, in their dtype."""
    model: torch.nn.Module = LlamaForCausalLM(llama_config(config))
    model = model.to(weights["norm.weight"].dtype)
    state = {hugging_face_name(name): weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied else set())
    if weights["norm.weight"].dtype == torch.float64:
        _keep_float64(model)
    return model


def _keep_float64(model: torch.nn.Module) -> None:
    """transformers' norm computes in float32 whatever the input: put torch's own in its place."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)
