"""Decoders: their shapes, code, initial weights and operation counts."""

from megatron_ext.models.attention_inputs import AttentionInputs, attention_pattern
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.decoder import Decoder, StageSpec, parameter_shapes
from megatron_ext.models.initialize import initialize_parameter, initialize_weights
from megatron_ext.models.presets import preset, preset_names

__all__ = [
    "AttentionInputs",
    "Decoder",
    "ModelConfig",
    "StageSpec",
    "attention_pattern",
    "initialize_parameter",
    "initialize_weights",
    "parameter_shapes",
    "preset",
    "preset_names",
]
