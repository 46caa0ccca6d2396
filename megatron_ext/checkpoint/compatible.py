"""Checkpoints of models of which a part was trained: what of them a run can take over."""

import dataclasses
from pathlib import Path

from megatron_ext.checkpoint.directory import Manifest
from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.optim import TrainableConfig

# fields that change no stored tensor
_FREE_LORA_FIELDS = ("lora_dropout",)


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
    stored, asked = _plain(manifest.lora), _plain(dataclasses.asdict(config.adapters))
    for name, value in asked.items():
        if stored[name] != value and name not in _FREE_LORA_FIELDS:
            raise RequestError(
                f"--load {checkpoint}: its adapters have {name} {stored[name]}, the run asks for {value} "
                f"(--{name.replace('_', '-')})"
            )


def _plain(values: dict) -> dict:
    """As JSON gives it back, with the order of a list of names forgotten."""
    return {name: sorted(value) if isinstance(value, (tuple, list)) else value for name, value in values.items()}
