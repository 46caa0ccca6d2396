"""Whether a run can take over a checkpoint: its model's shape, and which part of it was trained."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.directory import MANIFEST, Manifest
from megatron_ext.checkpoint.model import model_of
from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.models.expand import Expansion
from megatron_ext.optim import TrainableConfig
from megatron_ext.tensor_parallel import LoraConfig

# fields that change no stored tensor and that people change on purpose: a checkpoint may be continued with others
_FREE_FIELDS = frozenset({"init_method_std", "max_position_embeddings", "norm_epsilon", "rotary_base", "window_size"})
_FREE_LORA_FIELDS = ("lora_dropout",)
_RESIZE_REMEDY = (
    "; to give a larger vocabulary's rows values, add --finetune --embedding-init METHOD --base-tokenizer-model OLD, "
    "or convert the checkpoint first with tools.convert_checkpoint --embedding-init METHOD"
)


def check_compatible(
    manifest: Manifest, model: ModelConfig, checkpoint: Path, expansion: Expansion | None = None
) -> None:
    """Raise RequestError naming the first field in which the checkpoint's model is another one.

    expansion: how the checkpoint's vocabulary is to grow to the model's.
    """
    stored_model = dataclasses.asdict(model_of(manifest, f"--load {checkpoint}: {MANIFEST}")[0].resolved())
    if expansion is not None:
        expansion.check_vocabulary(stored_model["vocab_size"], f"--load {checkpoint}")
        stored_model["vocab_size"] = expansion.new_size
    for name, wanted in dataclasses.asdict(model.resolved()).items():
        stored = stored_model[name]
        free = name in _FREE_FIELDS or name.startswith("rope_")
        if name == "max_position_embeddings" and model.position_embedding_type == "learned_absolute":
            free = False  # there it is the number of rows of a table
        if stored != wanted and not free:
            remedy = _RESIZE_REMEDY if name == "vocab_size" and stored < wanted else ""
            raise RequestError(
                f"--load {checkpoint}: its model has {name} {stored}, the run asks for {wanted} "
                f"(--{name.replace('_', '-')}){remedy}"
            )


def check_trained(manifest: Manifest, config: EngineConfig, checkpoint: Path, weights_only: bool) -> None:
    """Raise RequestError where the checkpoint lacks what the run needs, or has what the run would lose."""
    trainable = dataclasses.asdict(TrainableConfig()) | _plain(manifest.trainable or {})
    wanted = _plain(dataclasses.asdict(config.trainable))
    if manifest.has_optimizer and not weights_only and trainable != wanted:
        name = next(name for name in wanted if trainable[name] != wanted[name])
        raise RequestError(
            f"--load {checkpoint}: it was trained with {name} {trainable[name]}, the run asks for {wanted[name]} "
            f"(--{name.replace('_', '-')}): keep it, or start from the weights alone with --finetune"
        )
    if manifest.lora is None:
        return
    if config.adapters is None:
        raise RequestError(
            f"--load {checkpoint}: it has LoRA adapters: merge them first (python -m tools.convert_checkpoint --from "
            "native --to native), or go on with --train-only lora"
        )
    stored = _plain(dataclasses.asdict(LoraConfig()) | manifest.lora)
    asked = _plain(dataclasses.asdict(config.adapters))
    for name, value in asked.items():
        if stored[name] != value and name not in _FREE_LORA_FIELDS:
            raise RequestError(
                f"--load {checkpoint}: its adapters have {name} {stored[name]}, the run asks for {value} "
                f"(--{name.replace('_', '-')})"
            )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, with the order of a list of names forgotten."""
    return {name: sorted(value) if isinstance(value, (tuple, list)) else value for name, value in values.items()}
