"""Model types of Hugging Face, one small file each: LLaMA and its relatives."""

from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.bloom import BLOOM
from tools.conversion.families.falcon import FALCON
from tools.conversion.families.family import Family
from tools.conversion.families.glm import GLM
from tools.conversion.families.gpt2 import GPT2
from tools.conversion.families.llama import LLAMA
from tools.conversion.families.mistral import MISTRAL
from tools.conversion.families.opt import OPT
from tools.conversion.families.qwen2 import QWEN2
from tools.conversion.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GLM, BLOOM, OPT, FALCON, GPT2)}


def family_of(config: dict[str, Any]) -> Family:
    """The family that config.json names. Raises RequestError."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise RequestError(f"config.json: model_type {model_type!r} is not supported; {', '.join(FAMILIES)} are")
    return FAMILIES[model_type]


def family_for(model: ModelConfig) -> Family:
    """The first family that has words for all of `model`. Raises RequestError, with what the nearest one lacks."""
    lacks = []
    for family in FAMILIES.values():
        try:
            family.write(model)
        except RequestError as error:
            lacks.append(str(error))
        else:
            return family
    raise RequestError(f"no model type of Hugging Face known here is like this model: {'; '.join(lacks)}")


__all__ = ["FAMILIES", "Family", "family_for", "family_of"]
