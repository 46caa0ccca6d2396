"""Which model, and which adapters, a checkpoint is of."""

from megatron_ext.checkpoint.directory import MANIFEST, Manifest
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.option import check_types
from megatron_ext.tensor_parallel import LoraConfig


def model_of(manifest: Manifest, where: str = MANIFEST) -> tuple[ModelConfig, LoraConfig | None]:
    """The model that a manifest describes, and its adapters; None where there are none.

    Args:
        where: the manifest, as messages are to name it.

    Raises:
        RequestError: it describes neither, or one that this program does not know.
    """
    try:
        model = ModelConfig(**manifest.model)
        model.validate()
        lora = None if manifest.lora is None else LoraConfig(**manifest.lora)
        if lora is not None:
            check_types(lora)
            lora.validate()
    except (RequestError, TypeError) as error:
        newer = "written by a newer version?"
        raise RequestError(f"{where} describes a model that this program does not know ({error}): {newer}") from error
    return model, lora
