"""What config.json leaves out, or spells as of old, means what transformers takes it to mean."""

import dataclasses
import itertools
from typing import Any

import pytest

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families import FAMILIES
from tools.conversion.families.rope import ROPE_FIELDS

transformers = pytest.importorskip("transformers")

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 4.0}
# spellings of the rotation, of which many are of transformers 4, some of both at once
ROTATIONS: list[dict[str, Any]] = [
    {"rope_theta": 50000.0},
    {"rope_theta": 50000.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 50000.0}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 50000.0},
    {"rope_parameters": {}},
    {"rope_parameters": None, "rope_scaling": LINEAR},
    {"rope_scaling": LINEAR, "rope_theta": 50000.0},
    {"rope_scaling": LINEAR | {"rope_theta": 70000.0}, "rope_theta": 50000.0},
    {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 70000.0}},
    {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "max_position_embeddings": 5000},
    {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 3000}},
    {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}, "original_max_position_embeddings": 3000},
    {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 3000}},
]
OTHERS: list[dict[str, Any]] = [
    {"num_attention_heads": 8, "hidden_size": 64},
    {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": None},
    {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 4, "head_dim": None},
    {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": 4, "head_dim": 16},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"sliding_window": None},
    {"sliding_window": 7},
    {"attention_bias": True, "mlp_bias": True},
    {"use_sliding_window": False, "max_window_layers": 2},
]
OF_FAMILY: dict[str, list[dict[str, Any]]] = {
    "bloom": [
        {"n_embed": 128},
        {"n_embed": 128, "hidden_size": 64},
        {"num_hidden_layers": 3, "num_attention_heads": 4},
    ],
    "opt": [{"word_embed_proj_dim": None}, {"word_embed_proj_dim": 768}, {"ffn_dim": 99}],
    "falcon": [
        {"multi_query": False},
        {"multi_query": None},
        {"new_decoder_architecture": True},
        {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
        {"new_decoder_architecture": None, "num_kv_heads": 71},
        {"ffn_hidden_size": None},
        {"ffn_hidden_size": 100, "bias": True},
        {"n_embed": 71 * 4},
    ],
    "glm": [{"partial_rotary_factor": 0.25}, {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0}}],
}
CASES = {
    f"{model_type}: {', '.join(f'{name} {value}' for name, value in fields.items()) or 'nothing'}": (model_type, fields)
    for model_type, family in FAMILIES.items()
    for fields in itertools.chain([{}], ROTATIONS if family.rotary else (), OTHERS, OF_FAMILY.get(model_type, ()))
    if (model_type, "head_dim" in fields) != ("falcon", True)  # which has no such field
}


def read(config: dict[str, Any]) -> ModelConfig:
    """What we read; fields of a scaling that is not there aside."""
    model = FAMILIES[config["model_type"]].read(config).resolved()
    return model if model.rope_scaling == "llama3" else dataclasses.replace(model, **dict.fromkeys(ROPE_FIELDS, 1))


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_what_transformers_takes_it_to_be(case: str) -> None:
    """transformers fills in what is missing; nothing then is left to guess."""
    model_type, fields = CASES[case]
    config = {"model_type": model_type} | fields
    try:
        full = transformers.CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception:  # no model to transformers; nor to us
        with pytest.raises(RequestError):
            read(config)
        return
    try:
        model = read(config)
    except RequestError:  # of what we do not support, written out too
        with pytest.raises(RequestError):
            read(full)
        return
    assert model == read(full)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_in_full_are_transformers_own(model_type: str) -> None:
    """Against attributes of its configuration, not through our reading of them."""
    theirs, ours = transformers.CONFIG_MAPPING[model_type](), read({"model_type": model_type})
    assert (ours.num_layers, ours.hidden_size, ours.num_attention_heads, ours.vocab_size, ours.tied) == (
        theirs.num_hidden_layers,
        theirs.hidden_size,
        theirs.num_attention_heads,
        theirs.vocab_size,
        theirs.tie_word_embeddings,
    )
    epsilon = next(
        (getattr(theirs, name) for name in ("rms_norm_eps", "layer_norm_epsilon") if hasattr(theirs, name)), 1e-5
    )
    assert ours.norm_epsilon == epsilon
    for name, value in (
        ("max_position_embeddings", ours.max_position_embeddings),
        ("intermediate_size", ours.ffn_hidden_size),
        ("head_dim", ours.head_dim),
        ("num_key_value_heads", ours.kv_heads),
    ):
        assert getattr(theirs, name, value) == value
    if ours.position_embedding_type == "rope":
        assert theirs.rope_parameters["rope_theta"] == ours.rotary_base
        assert theirs.rope_parameters.get("partial_rotary_factor", 1.0) == ours.rotary_percent


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"rms_norm_eps": None}, "rms_norm_eps None of a llama model is not supported"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings None of a llama model is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config {'quant_method': 'gptq'} of a llama "),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights 'x.safetensors' of a llama model is not"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config {'0': {}} of a llama model is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 of such a model is not supported"),
        ({"rope_parameters": {"full_attention": {}}}, "a rotation of its own for full_attention is not supported"),
        ({"rope_theta": None}, "does not describe a llama model (TypeError"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "(KeyError: 'low_freq_factor')"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_what_would_be_another_model_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as refusal:
        read({"model_type": "llama"} | fields)
    assert str(refusal.value).startswith("config.json: ")
    assert reason in str(refusal.value)
