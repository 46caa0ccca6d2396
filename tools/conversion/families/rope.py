"""The rotation in config.json: transformers 5 keeps theta and scaling together in `rope_parameters`, 4 apart."""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig

_LLAMA3 = {
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_max_position",
}
ROPE_FIELDS = frozenset(_LLAMA3.values())  # they mean something under llama3 scaling only


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields of the rotation. Raises RequestError for a scaling that is not supported."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values = {"rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is not None:
        values["rotary_percent"] = float(share)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return values
    if kind not in ("linear", "llama3"):
        raise RequestError(f"config.json: rope scaling {kind!r} is not supported; linear and llama3 are")
    scaling = {ours: rope[theirs] for theirs, ours in _LLAMA3.items() if theirs in rope} if kind == "llama3" else {}
    return values | {"rope_scaling": kind, "rope_scaling_factor": rope["factor"]} | scaling


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """config.json's fields of the rotation, as both versions of transformers read them."""
    scaling: dict[str, Any] | None = None
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
        if model.rope_scaling == "llama3":
            scaling |= {theirs: getattr(model, ours) for theirs, ours in _LLAMA3.items()}
    share = {} if model.rotary_percent == 1.0 else {"partial_rotary_factor": model.rotary_percent}
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling} | share
