"""The rotation in config.json: transformers 5 keeps theta and scaling together in `rope_parameters`, 4 apart.

What is left out is what transformers takes it to be (RotaryEmbeddingConfigMixin in modeling_rope_utils.py).
"""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig

_FACTORS = {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = _FACTORS | {_ORIGINAL: "rope_original_max_position"}
ROPE_FIELDS = frozenset(_LLAMA3.values())  # they mean something under llama3 scaling only
_SHARE = "partial_rotary_factor"


def read_rope(config: dict[str, Any], partial: bool) -> dict[str, Any]:
    """ModelConfig's fields of the rotation. Raises RequestError for a scaling that is not supported.

    partial: the family knows of a rotation of a part of every head.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    values = {"rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    for name, value in rope.items():
        if isinstance(value, dict):
            raise RequestError(f"config.json: a rotation of its own for {name} is not supported")
    share = float(rope.get(_SHARE, config.get(_SHARE, 1.0)))
    if partial:
        values["rotary_percent"] = share
    elif share != 1.0:
        raise RequestError(
            f"config.json: {_SHARE} {share} of such a model is not supported, not by transformers either"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return values
    if kind not in ("linear", "llama3"):
        raise RequestError(f"config.json: rope scaling {kind!r} is not supported; linear and llama3 are")
    if kind == "linear" and rope["factor"] == 1:  # says nothing
        return values
    values |= {"rope_scaling": kind, "rope_scaling_factor": rope["factor"]}
    if kind == "llama3":
        values |= {ours: rope[theirs] for theirs, ours in _FACTORS.items()}
        original = config.get(_ORIGINAL, rope.get(_ORIGINAL, config["max_position_embeddings"]))
        values["rope_original_max_position"] = original
    return values


def write_rope(model: ModelConfig, partial: bool) -> dict[str, Any]:
    """config.json's fields of the rotation, as both versions of transformers read them."""
    scaling: dict[str, Any] | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
        if model.rope_scaling == "llama3":
            scaling |= {theirs: getattr(model, ours) for theirs, ours in _LLAMA3.items()}
    share = {_SHARE: model.rotary_percent} if partial else {}
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling} | share
