"""What a run is, in the lines with which it begins."""

import dataclasses

from megatron_ext.checkpoint import Manifest, differences, model_of
from megatron_ext.engine import EngineConfig
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import parameter_shapes
from megatron_ext.optim.trainable import describe as describe_selections
from megatron_ext.optim.trainable import select
from pretrain.checkpoints import Start
from pretrain.config import RunConfig


def describe(config: EngineConfig, grid: ProcessGrid) -> list[str]:
    """The model and how it is spread; then, where only some parameters are trained, which. config: validated."""
    selections = select(config.trainable, parameter_shapes(config.model, config.adapters))
    total = sum(s.trained + s.frozen for s in selections)
    compute = str(config.precision.compute).removeprefix("torch.")
    if grid.device.type != "meta":
        compute += f" on {grid.device.type}"
    return [
        f"{total:,} parameters, vocabulary {config.model.vocab_size} | {grid.describe} | {config.zero.describe} | "
        f"{config.batch.microbatches(grid.dp_size)} microbatches of {config.batch.micro_batch_size} x "
        f"{config.batch.seq_length} tokens per rank | compute in {compute}",
        *describe_selections(selections),
    ]


def describe_start(config: RunConfig, start: Start, manifest: Manifest) -> list[str]:
    """How the run's checkpoint was found, which model it is of, and what of it goes on. manifest: the checkpoint's."""
    options, stored = config.checkpoint, model_of(manifest)[0]
    model = dataclasses.asdict(config.model)
    told = ", ".join(
        f"{field.name} {model[field.name]}"
        for field in dataclasses.fields(stored)
        if model[field.name] != field.default
    )
    lines = [*start.remarks, f"the model is that of {start.checkpoint}: {told}"]
    for name in options.overridden & set(differences(stored, config.model)):
        lines.append(f"{name} {model[name]} and not {getattr(stored, name)}, by --override-checkpoint-args")
    if options.embedding_init is not None and start.weights_only:
        lines.append(f"new rows of the vocabulary beside those of {start.checkpoint}: {options.embedding_init}")
    if not start.weights_only and manifest.iteration:
        lines.append(f"continuing from iteration {manifest.iteration} of {options.load}")
    return lines
