"""Which model a checkpoint is of, and whether a run can take it over: the model in all its fields, what was trained."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.directory import MANIFEST, Manifest
from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from megatron_ext.models.expand import Expansion
from megatron_ext.optim import TrainableConfig
from megatron_ext.option import check_types, flag_of
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
        if (model.rope_scaling, model.rope_scaling_factor) == ("linear", 1):  # older versions wrote so what is none
            model = dataclasses.replace(model, rope_scaling="none")
        model.validate()
        lora = None if manifest.lora is None else LoraConfig(**manifest.lora)
        if lora is not None:
            check_types(lora)
            lora.validate()
    except (RequestError, TypeError) as error:
        newer = "written by a newer version?"
        raise RequestError(f"{where} describes a model that this program does not know ({error}): {newer}") from error
    return model, lora


_FREE_FIELDS = frozenset({"init_method_std"})  # says how new parameters begin, nothing of those that are there
_SIZES = frozenset(
    {
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size", "num_query_groups",
        "kv_channels",
    }
)  # fmt: skip
_FREE_LORA_FIELDS = ("lora_dropout",)
_RESIZE_REMEDY = (
    "; to give a larger vocabulary's rows values, add --finetune --embedding-init METHOD --base-tokenizer-model OLD, "
    "or convert the checkpoint first with tools.convert_checkpoint --embedding-init METHOD"
)


def check_compatible(
    manifest: Manifest,
    model: ModelConfig,
    checkpoint: Path,
    expansion: Expansion | None = None,
    overridden: Collection[str] = (),
    flag: str = "--load",
) -> None:
    """Raise RequestError naming the fields in which the checkpoint's model is another one, by shape or by function.

    expansion: how the checkpoint's vocabulary is to grow to the model's.
    overridden: fields in which it may be another one, if that changes no stored tensor.
    flag: that names the checkpoint.
    """
    stored = model_of(manifest, f"{flag} {checkpoint}: {MANIFEST}")[0].resolved()
    if expansion is not None:
        expansion.check_vocabulary(stored.vocab_size, f"{flag} {checkpoint}")
        stored = dataclasses.replace(stored, vocab_size=expansion.new_size)
    differing = [name for name in differences(stored, model) if name not in _FREE_FIELDS]
    shaping = [name for name in differing if _shapes_differ(stored, name, getattr(model.resolved(), name))]
    wrong = [name for name in differing if name in shaping or name not in overridden]
    if not wrong:
        return
    says = "; ".join(
        f"{name} {getattr(stored, name)}, the run asks for {getattr(model.resolved(), name)} ({flag_of(name)})"
        for name in wrong
    )
    remedy = ""
    if "vocab_size" in wrong and stored.vocab_size < model.vocab_size:
        remedy = _RESIZE_REMEDY
    elif not shaping:
        remedy = (
            f"; what is neither given nor a preset's is the checkpoint's, and to change it give "
            f"--override-checkpoint-args {' '.join(wrong)}"
        )
    raise RequestError(f"{flag} {checkpoint}: its model has {says}{remedy}")


def differences(stored: ModelConfig, model: ModelConfig) -> list[str]:
    """Names of the fields in which a model departs from the stored one; what has no effect in it does not count."""
    ours, theirs = dataclasses.asdict(model.resolved()), dataclasses.asdict(stored.resolved())
    return [name for name, value in ours.items() if value != theirs[name] and name not in model.idle()]


def _shapes_differ(model: ModelConfig, name: str, value: Any) -> bool:
    """Whether another value of one field makes other tensors."""
    if name in _SIZES:
        return True
    layer = dataclasses.replace(model, num_layers=1)
    return parameter_shapes(dataclasses.replace(layer, **{name: value})) != parameter_shapes(layer)


def check_trained(
    manifest: Manifest, config: EngineConfig, checkpoint: Path, weights_only: bool, flag: str = "--load"
) -> None:
    """Raise RequestError where the checkpoint lacks what the run needs, or has what the run would lose."""
    continues = manifest.has_optimizer and not weights_only
    if continues and manifest.optimizer != config.optimizer.optimizer:
        raise RequestError(
            f"{flag} {checkpoint}: its optimizer is {manifest.optimizer}, the run asks for --optimizer "
            f"{config.optimizer.optimizer}: keep it, or start from the weights alone with --finetune"
        )
    trainable = dataclasses.asdict(TrainableConfig()) | _plain(manifest.trainable or {})
    wanted = _plain(dataclasses.asdict(config.trainable))
    if continues and trainable != wanted:
        name = next(name for name in wanted if trainable[name] != wanted[name])
        raise RequestError(
            f"{flag} {checkpoint}: it was trained with {name} {trainable[name]}, the run asks for {wanted[name]} "
            f"({flag_of(name)}): keep it, or start from the weights alone with --finetune"
        )
    if manifest.lora is None:
        return
    if config.adapters is None:
        raise RequestError(
            f"{flag} {checkpoint}: it has LoRA adapters: merge them first (python -m tools.convert_checkpoint --from "
            "native --to native), or go on with --train-only lora"
        )
    stored = _plain(dataclasses.asdict(LoraConfig()) | manifest.lora)
    asked = _plain(dataclasses.asdict(config.adapters))
    for name, value in asked.items():
        if stored[name] != value and name not in _FREE_LORA_FIELDS:
            raise RequestError(
                f"{flag} {checkpoint}: its adapters have {name} {stored[name]}, the run asks for {value} "
                f"({flag_of(name)})"
            )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, with the order of a list of names forgotten."""
    return {name: sorted(value) if isinstance(value, (tuple, list)) else value for name, value in values.items()}
