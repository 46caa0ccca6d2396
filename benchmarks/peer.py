"""What this project is measured beside."""

from typing import Any

import torch

from megatron_ext.models import ModelConfig
from tools.conversion.families import family_for


def transformers_model(model: ModelConfig, device: torch.device) -> Any:
    """transformers' model of this shape with its initial weights in float32, attention by torch's fused kernels."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**family_for(model).write(model) | {"dtype": "float32"})
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
